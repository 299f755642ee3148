"""The edge's and this node's certificates from Vault's PKI, in place of the local authority's."""

from __future__ import annotations

import datetime as dt
import socket
from pathlib import Path

from cryptography import x509

from cluster.errors import ConfigError
from cluster.security.keys.configured import logged_in
from cluster.security.keys.vault_session import issue_certificate
from cluster.security.tls.certificates import (
    CA_NAME,
    EDGE_NAME,
    LOOPBACK,
    NODE_CERTIFICATE_NAME,
    NODE_KEY_NAME,
)
from cluster.security.tokens.issuer import replace_private
from cluster.settings import VaultConfig
from cluster.storage import Layout, local


def fetch_certificates(places: Layout, vault: VaultConfig, *, now: dt.datetime | None = None) -> None:
    """Have certificates for localhost and this machine, new ones in the last third of their life.

    Args:
        places: the storage root's.
        vault: where to log in, and the role.
        now: the moment that counts for how long they still hold; none is the clock's.

    Raises:
        ConfigError: no role is configured.
        Unauthenticated, AccessDenied, InvalidRequest, KeyStoreUnavailable: as Vault says; what there is stays.
    """
    if vault.pki_role is None:
        raise ConfigError("secrets.vault.pki_role is missing. Give the PKI's role that issues certificates.")
    folder, at = local(places.tls), now or dt.datetime.now(dt.UTC)
    names = (EDGE_NAME, NODE_CERTIFICATE_NAME, NODE_KEY_NAME, CA_NAME)
    if all((folder / name).exists() for name in names) and not _is_late(folder / EDGE_NAME, at):
        return
    issued = issue_certificate(
        logged_in(vault),
        role=vault.pki_role,
        common_name=socket.gethostname(),
        alt_names=("localhost",),
        ip_addresses=LOOPBACK,
        ttl_s=vault.pki_ttl_s,
        mount=vault.pki_mount,
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    chain = "\n".join((issued.certificate.strip(), *(one.strip() for one in issued.ca_chain))) + "\n"
    key = issued.private_key.strip() + "\n"
    replace_private(folder / CA_NAME, f"{issued.ca_chain[-1].strip()}\n".encode(), mode=0o644)
    replace_private(folder / NODE_KEY_NAME, key.encode())
    replace_private(folder / NODE_CERTIFICATE_NAME, chain.encode(), mode=0o644)
    replace_private(folder / EDGE_NAME, (chain + key).encode())


def _is_late(path: Path, at: dt.datetime) -> bool:
    found = x509.load_pem_x509_certificate(path.read_bytes())
    life = found.not_valid_after_utc - found.not_valid_before_utc
    return found.not_valid_after_utc - at < life / 3
