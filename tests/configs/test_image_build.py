"""Tests of the settings that pip gets while the image is built."""

from __future__ import annotations

from pathlib import Path

from tests.image.build import PIP_FOLDER, pip_settings


def test_build_installs_from_where_this_machine_installs(tmp_path: Path) -> None:
    """Folders and files of this machine get a mount, other settings stay, and environment variables have precedence."""
    certificate, index = tmp_path / "ca.pem", tmp_path / "index"
    certificate.write_text("")
    (index / "simple").mkdir(parents=True)
    settings = pip_settings(
        [
            f":env:.cert='{certificate}'",
            "global.cert='/nowhere/ca.pem'",
            "global.index-url='https://packages.example/simple'",
            f"global.extra-index-url='file://{index}/simple'",
            "global.quiet='1'",
        ]
    )
    assert settings.text.splitlines() == [
        "[global]",
        "index-url = https://packages.example/simple",
        f"extra-index-url = file://{PIP_FOLDER}/0/simple",
        f"cert = {PIP_FOLDER}/1",
    ]
    assert settings.mounts == {str(index): f"{PIP_FOLDER}/0", str(certificate): f"{PIP_FOLDER}/1"}
