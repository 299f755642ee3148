"""Certificates from Vault's PKI, with a Vault double."""

from __future__ import annotations

import datetime as dt
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from cluster.errors import ConfigError, InvalidRequest
from cluster.security.tls.pki import fetch_certificates
from cluster.settings import VaultConfig
from cluster.storage import Layout
from tests.servers.vault_double import VaultDouble


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[VaultConfig]:
    secret = tmp_path / "secret-id"
    secret.touch(mode=0o600)
    secret.write_text("canary")
    with VaultDouble() as double:
        double.state.approles["falaj"] = "canary"
        double.state.pki_roles["nodes"] = (socket.gethostname(),)
        yield VaultConfig(address=double.address, secret_file=str(secret), pki_role="nodes", pki_ttl_s=3600)


def files(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "tls").iterdir()}


def test_certificates_come_from_the_authority_of_vault(tmp_path: Path, vault: VaultConfig) -> None:
    """The files have the names that other modules expect, and only the owner can read the keys."""
    fetch_certificates(Layout(str(tmp_path)), vault)
    written = files(tmp_path)
    assert set(written) == {"ca.pem", "edge.pem", "node.pem", "node.key"}
    authority = x509.load_pem_x509_certificate(written["ca.pem"])
    for name in ("edge.pem", "node.pem"):
        x509.load_pem_x509_certificate(written[name]).verify_directly_issued_by(authority)
    for name in ("edge.pem", "node.key"):
        assert b"PRIVATE KEY" in written[name]
        assert (tmp_path / "tls" / name).stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in written["node.pem"] + written["ca.pem"]


@pytest.mark.parametrize(("share", "renewed"), [(0.5, False), (0.7, True)])
def test_certificates_are_renewed_in_their_last_third(
    tmp_path: Path, vault: VaultConfig, share: float, renewed: bool
) -> None:
    places = Layout(str(tmp_path))
    fetch_certificates(places, vault)
    before = files(tmp_path)
    certificate = x509.load_pem_x509_certificate(before["edge.pem"])
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    fetch_certificates(places, vault, now=certificate.not_valid_before_utc + lifetime * share)
    assert (files(tmp_path)["edge.pem"] != before["edge.pem"]) == renewed


def test_refused_renewal_keeps_the_certificates(tmp_path: Path, vault: VaultConfig) -> None:
    """Without a configured role, Vault is not called."""
    places = Layout(str(tmp_path))
    fetch_certificates(places, vault)
    before = files(tmp_path)
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=30)
    vault.pki_role = "nobody"
    with pytest.raises(InvalidRequest):
        fetch_certificates(places, vault, now=later)
    vault.pki_role = None
    with pytest.raises(ConfigError, match="pki_role"):
        fetch_certificates(places, vault, now=later)
    assert files(tmp_path) == before
