"""The edge's certificate while its file is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.security.tls.certificates import EDGE_NAME, ensure_tls
from cluster.storage import Layout
from serve_apps.edge.control.certificate import Certificate

PRIVATE = b"-----BEGIN PRIVATE KEY-----"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    ensure_tls(Layout(str(tmp_path)))
    return tmp_path / "tls" / EDGE_NAME


@pytest.mark.parametrize("broken", [b"", b"no certificate", None])
def test_last_valid_certificate_is_used(file: Path, tmp_path: Path, broken: bytes | None) -> None:
    """An edge that starts while the file is broken, half written or missing uses it, too."""
    copies = tmp_path / "copies"
    certificate, content = Certificate(file, copies), file.read_bytes()
    good = certificate.newest()
    assert good != file
    assert good.read_bytes() == content
    file.unlink()
    if broken is not None:
        file.write_bytes(broken)
    assert certificate.newest() == good
    assert Certificate(file, copies).newest() == good
    file.write_bytes(content[: len(content) // 2])
    assert certificate.newest() == good
    assert list(copies.iterdir()) == [good]


def test_key_of_another_certificate_is_refused(file: Path, tmp_path: Path) -> None:
    """Every client would refuse the pair."""
    ensure_tls(Layout(str(tmp_path / "other")))
    other = tmp_path / "other" / "tls" / EDGE_NAME
    certificate = Certificate(file, tmp_path / "copies")
    good = certificate.newest()
    (shown, key), (_, other_key) = (one.read_bytes().split(PRIVATE) for one in (file, other))
    assert key != other_key
    file.write_bytes(shown + PRIVATE + other_key)
    assert certificate.newest() == good


def test_without_a_valid_certificate_the_file_itself_is_used(tmp_path: Path) -> None:
    """So HAProxy reports the error in the file."""
    missing = tmp_path / "none.pem"
    assert Certificate(missing, tmp_path / "copies").newest() == missing
