"""A new certificate for a node before the old one expires: the node's request, and the head's answer.

The node has the same key as before, so it replaces only one file. Processes that read key and certificate never read
two that do not match. Open connections continue with the old certificate.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from cryptography import x509

from cluster.errors import ConfigError, Unauthenticated
from cluster.ledger import Ledger
from cluster.ledger.events import NodeCertificateRenewed
from cluster.membership.admission import ACTOR, fingerprint, requested_key, signing_request
from cluster.membership.head_client import HeadClient
from cluster.membership.members import Member
from cluster.membership.transport import Peer
from cluster.security.keys.store import KeyStoreUnavailable
from cluster.security.tls.certificates import (
    CA_NAME,
    EDGE_NAME,
    LOOPBACK,
    NODE_CERTIFICATE_NAME,
    NODE_KEY_NAME,
    alternative_names,
    in_last_third,
    is_foreign_authority,
    private_key,
    sign_node_key,
)
from cluster.security.tokens.issuer import replace_private_file
from cluster.session import ClusterRecord
from cluster.storage import local

RENEW = "renew"
"""The node's operation."""
EARLIEST_SHARE = 0.5
"""Share of a certificate's lifetime after which the head renews it. Nodes ask later than that; clocks may differ."""
PAUSE, PAUSE_SHARE = dt.timedelta(hours=1), 0.01
"""Shortest time between two renewals for a node; for a short lifetime, this share of it. A node that cannot write its
new certificate asks once a minute, and must not fill the ledger with events."""


def renew(
    request: dict[str, object], peer: Peer, node: Member | None, *, record: ClusterRecord, ledger: Ledger
) -> str:
    """Sign a certificate with the names of the one that the node has shown, and record the event.

    Raises:
        Unauthenticated: the request comes from another address than the node's, has another key, or its signature is
            wrong.
        ConfigError: it is too early for a renewal, or another authority issued the certificate.
        InvalidRequest: the request is damaged.
    """
    tls, text = local(record.layout.tls), request.get("signing_request")
    if node is None or peer.shown is None or is_foreign_authority(tls / CA_NAME):
        raise ConfigError(
            "The head renews only certificates of nodes that it has issued. This one comes from another authority: "
            "get a new one there, put it into <storage.local>/tls, run `python -m cluster.leave`, and join again."
        )
    if peer.address != node.address:
        raise Unauthenticated(f"The head renews the certificate of {node.address}, not of {peer.address}.")
    shown = x509.load_der_x509_certificate(peer.shown)
    now, lifetime = dt.datetime.now(dt.UTC), shown.not_valid_after_utc - shown.not_valid_before_utc
    if now < shown.not_valid_before_utc + lifetime * EARLIEST_SHARE:
        raise ConfigError(
            f"The certificate of node {node.node_id} is valid until {shown.not_valid_after_utc:%Y-%m-%d %H:%M:%S} "
            "UTC. The head renews it in the second half of its lifetime."
        )
    pause = min(PAUSE, lifetime * PAUSE_SHARE)
    if node.renewed_at is not None and now < dt.datetime.fromisoformat(node.renewed_at) + pause:
        raise ConfigError(
            f"The head renewed the certificate of node {node.node_id} at {node.renewed_at}. If the node could not "
            f"write it, it can ask again after {pause.total_seconds():.0f} s."
        )
    key = requested_key(text if isinstance(text, str) else "")
    if key != shown.public_key():
        raise Unauthenticated(
            f"The head renews the certificate of node {node.node_id} for the node's own key only."
        )
    names = {str(name.value) for name in alternative_names(shown)}.difference(LOOPBACK, {node.address})
    certificate = sign_node_key(
        key,
        authority=tls,
        name=node.name,
        addresses=[node.address],
        other_names=sorted(names),
    )
    ledger.append(renewal_event(record, node.node_id, certificate), actor=ACTOR)
    return certificate.decode()


def renewal_event(record: ClusterRecord, node_id: str, certificate: bytes) -> NodeCertificateRenewed:
    """Return the event of a new certificate.

    Args:
        record: the cluster.
        node_id: the node, or `head`.
        certificate: the certificate, as PEM.
    """
    expires_at = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    return NodeCertificateRenewed(
        cluster_id=record.cluster_id,
        node_id=node_id,
        certificate=fingerprint(certificate),
        expires_at=expires_at.isoformat(timespec="seconds"),
    )


def renew_from_head(tls: Path, head: HeadClient) -> bool:
    """Get a new certificate if less than a third of the lifetime is left, and return whether it was renewed.

    Raises:
        ConfigError: the certificate has expired.
        KeyStoreUnavailable: the head does not answer, or its answer is no certificate for this node's key.
        FalajError: the head's refusal.
        OSError: a file cannot be read or written.
    """
    path, key = tls / NODE_CERTIFICATE_NAME, private_key(tls / NODE_KEY_NAME)
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    if (
        key is None
        or is_foreign_authority(tls / CA_NAME)
        or not in_last_third(certificate, dt.datetime.now(dt.UTC))
    ):
        return False
    answer = head.request(RENEW, signing_request=signing_request(key, "node"))
    new = str(answer).encode()
    try:
        fits = x509.load_pem_x509_certificate(new).public_key() == key.public_key()
    except ValueError:
        fits = False
    if not fits:
        raise KeyStoreUnavailable("The head's answer is no certificate for this node's key.")
    # The age of node.pem decides when to renew, so it is written last.
    replace_private_file(tls / EDGE_NAME, new + (tls / NODE_KEY_NAME).read_bytes())
    replace_private_file(path, new, mode=0o644)
    return True
