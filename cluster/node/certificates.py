"""A machine's certificates: creation and renewal on a head, and their description in `cluster.status`.

The certificates of a node that joined come from the head (`cluster/membership/renewal.py`).
"""

from __future__ import annotations

import datetime as dt

from cryptography import x509

from cluster.node.edge_address import edge_names
from cluster.security.tls.certificates import (
    CA_NAME,
    CLOCK_SKEW,
    NODE_CERTIFICATE_NAME,
    ensure_tls,
    is_foreign_authority,
)
from cluster.security.tls.pki import fetch_certificates
from cluster.session import ClusterRecord
from cluster.settings import PlatformConfig, SecretsKind
from cluster.storage import layout, local


def ensure_certificates(config: PlatformConfig, record: ClusterRecord) -> None:
    """Create certificates of a head that are missing, and renew those with less than a third of their lifetime left.

    Raises:
        ConfigError: files of another authority are missing, or lack an address of this machine.
        FalajError: Vault does not answer, or refuses. Existing certificates stay.
    """
    storage, vault = layout(config.storage), config.secrets.vault
    if config.secrets.kind is SecretsKind.vault and vault.pki_role is not None:
        fetch_certificates(storage, vault, names=(record.address, *edge_names(config.cluster)))
    else:
        ensure_tls(storage, addresses=(record.address,), edge_names=edge_names(config.cluster))


def describe_certificate(record: ClusterRecord, *, ray_started_at: float | None) -> str:
    """Return how long this machine's certificate lasts, and what the operator must do about it.

    Ray's processes read it only when they start. After a renewal they use the earlier one, which is then valid for
    another third of its lifetime.

    Args:
        record: the machine.
        ray_started_at: Unix seconds at which the raylet started; None if it does not run.
    """
    tls = local(record.layout.tls)
    try:
        certificate = x509.load_pem_x509_certificate((tls / NODE_CERTIFICATE_NAME).read_bytes())
    except (OSError, ValueError):
        return "missing or damaged  <- problem"
    again = (
        "`python -m cluster.down`, then `python -m cluster.up`"
        if record.node_id is None
        else "`python -m cluster.leave`, then join again"
    )
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if ends < dt.datetime.now(dt.UTC):
        return f"expired on {ends:%Y-%m-%d}: run {again}  <- problem"
    renewer = "you renew it" if is_foreign_authority(tls / CA_NAME) else "the supervisor renews it"
    text = f"until {ends:%Y-%m-%d}; {renewer}"
    issued_at = begins + CLOCK_SKEW
    if ray_started_at is not None and ray_started_at < issued_at.timestamp():
        earlier = issued_at + (ends - begins) / 3
        text += f". Ray started with an earlier one, valid until about {earlier:%Y-%m-%d}: run {again} before that"
    return text
