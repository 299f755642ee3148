"""The local CA and the edge's certificate, used by real TLS connections."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509

from cluster.security.tls import ensure_tls
from cluster.storage import Layout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tls folder of a new storage root."""
    ensure_tls(Layout(str(tmp_path)))
    return tmp_path / "tls"


def connect(server_pem: Path, ca: Path, name: str) -> str | None:
    """The TLS version that a client and a server in memory agree on."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(server_pem)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cafile=str(ca)).wrap_bio(to_client, to_server, server_hostname=name)
    answerer = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(5):
        for side in (client, answerer):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.version()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "::1"])
def test_a_client_that_trusts_the_ca_connects(folder: Path, name: str) -> None:
    """By address and by name, with strict verification."""
    assert connect(folder / "edge.pem", folder / "ca.pem", name) == "TLSv1.3"


def test_another_host_name_is_refused(folder: Path) -> None:
    """The certificate speaks for this machine's loopback only."""
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        connect(folder / "edge.pem", folder / "ca.pem", "example.org")


def test_another_ca_is_refused(folder: Path, tmp_path: Path) -> None:
    """Every storage root has a CA of its own."""
    ensure_tls(Layout(str(tmp_path / "other")))
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(folder / "edge.pem", tmp_path / "other" / "tls" / "ca.pem", "localhost")


def test_only_the_ca_may_sign_and_the_edge_may_only_serve(folder: Path) -> None:
    """Basic constraints and key usages."""
    ca = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    edge = x509.load_pem_x509_certificate((folder / "edge.pem").read_bytes())
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not edge.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usages = list(edge.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usages == [x509.ExtendedKeyUsageOID.SERVER_AUTH]


def test_keys_are_for_their_owner_and_a_second_start_keeps_them(folder: Path) -> None:
    """Clients that trust the CA go on working."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("edge.pem", "ca.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in files["ca.pem"]
    ensure_tls(Layout(str(folder.parent)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_start_that_was_cut_short_is_made_up_for(folder: Path) -> None:
    """The edge's file is written last: without it all is made anew, and fits together."""
    (folder / "edge.pem").unlink()
    ensure_tls(Layout(str(folder.parent)))
    assert connect(folder / "edge.pem", folder / "ca.pem", "localhost") == "TLSv1.3"
