"""Which certificate the edge shows, while somebody else replaces its file."""

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
def test_the_last_certificate_that_held_is_shown(file: Path, tmp_path: Path, broken: bytes | None) -> None:
    """Also by an edge that starts while the file is broken, half written or gone."""
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


def test_a_key_of_another_certificate_is_not_taken(file: Path, tmp_path: Path) -> None:
    """The two would be refused by every client."""
    ensure_tls(Layout(str(tmp_path / "other")))
    other = tmp_path / "other" / "tls" / EDGE_NAME
    certificate = Certificate(file, tmp_path / "copies")
    good = certificate.newest()
    (shown, key), (_, other_key) = (one.read_bytes().split(PRIVATE) for one in (file, other))
    assert key != other_key
    file.write_bytes(shown + PRIVATE + other_key)
    assert certificate.newest() == good


def test_without_any_certificate_the_file_itself_is_named(tmp_path: Path) -> None:
    """So that HAProxy says what is wrong."""
    missing = tmp_path / "none.pem"
    assert Certificate(missing, tmp_path / "copies").newest() == missing
