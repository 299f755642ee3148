"""Certificates of the edge and this node from Vault's PKI, instead of the local authority."""

from __future__ import annotations

import datetime as dt
import socket
from collections.abc import Collection
from pathlib import Path

from cryptography import x509

from cluster.errors import ConfigError
from cluster.host.names import is_address
from cluster.security.tls.certificates import (
    CA_NAME,
    EDGE_NAME,
    LOOPBACK,
    NODE_CERTIFICATE_NAME,
    NODE_KEY_NAME,
    certificate_names,
    in_last_third,
)
from cluster.security.tokens.issuer import replace_private_file
from cluster.settings import VaultConfig
from cluster.storage import Layout, local


def fetch_certificates(
    places: Layout, vault: VaultConfig, *, names: Collection[str] = (), now: dt.datetime | None = None
) -> None:
    """Ensure certificates for localhost and this machine. Renew them if less than a third of their lifetime is left.

    Args:
        places: paths below the storage root.
        vault: Vault's address, login and PKI role.
        names: other names and addresses of the node and of its edge. The role must allow each as a DNS name, addresses
            included, because the edges' HAProxy compares DNS names only.
        now: the time for the check of the lifetime; the current time by default.

    Raises:
        ConfigError: no role is configured.
        Unauthenticated, AccessDenied, InvalidRequest, KeyStoreUnavailable: errors of Vault. Existing certificates stay.
    """
    if vault.pki_role is None:
        raise ConfigError(
            "secrets.vault.pki_role is missing. Set it to the PKI role that issues certificates."
        )
    folder, at = local(places.tls), now or dt.datetime.now(dt.UTC)
    files = (EDGE_NAME, NODE_CERTIFICATE_NAME, NODE_KEY_NAME, CA_NAME)
    all_exist = all((folder / name).exists() for name in files)
    others = [name for name in dict.fromkeys(names) if name not in LOOPBACK]
    has_names = certificate_names(folder / EDGE_NAME).issuperset(others)
    if all_exist and has_names and not _is_due(folder / EDGE_NAME, at):
        return
    # Imported here, because an installation with its own certificates needs neither hvac nor requests.
    from cluster.security.keys.vault_session import connect_to_vault, issue_certificate

    issued = issue_certificate(
        connect_to_vault(vault),
        role=vault.pki_role,
        common_name=socket.gethostname(),
        alt_names=("localhost", *others),
        ip_addresses=(*LOOPBACK, *filter(is_address, others)),
        ttl_s=vault.pki_ttl_s,
        mount=vault.pki_mount,
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    chain = (
        "\n".join((issued.certificate.strip(), *(authority.strip() for authority in issued.ca_chain))) + "\n"
    )
    key = issued.private_key.strip() + "\n"
    replace_private_file(folder / CA_NAME, f"{issued.ca_chain[-1].strip()}\n".encode(), mode=0o644)
    replace_private_file(folder / NODE_KEY_NAME, key.encode())
    replace_private_file(folder / NODE_CERTIFICATE_NAME, chain.encode(), mode=0o644)
    replace_private_file(folder / EDGE_NAME, (chain + key).encode())


def _is_due(path: Path, at: dt.datetime) -> bool:
    return in_last_third(x509.load_pem_x509_certificate(path.read_bytes()), at)
