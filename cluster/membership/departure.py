"""What ends with a node's membership: its certificate, tokens and record."""

from __future__ import annotations

import sys
from pathlib import Path

import sqlalchemy as sa

from cluster.errors import FalajError, first_line
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import ClusterStarted, ClusterStopped, NodeJoined, NodeLeft
from cluster.membership.admission import SHARED_FILES
from cluster.membership.head_client import HeadClient
from cluster.membership.members import current_members
from cluster.security.tls.certificates import (
    CA_NAME,
    EDGE_NAME,
    NODE_CERTIFICATE_NAME,
    NODE_KEY_NAME,
    is_foreign_authority,
)
from cluster.security.tokens.principal import current_actor
from cluster.session import ClusterRecord, record_path
from cluster.settings import PlatformConfig
from cluster.storage import local


def has_ended(ledger: Ledger, record: ClusterRecord) -> bool:
    """Return whether a node is no member any more: it has left, was replaced or removed, or its cluster has ended."""
    stopped = ledger.last(ClusterStopped)
    if stopped is not None and stopped.payload["cluster_id"] == record.cluster_id:
        return True
    started = ledger.last(ClusterStarted)
    if started is not None and started.payload["cluster_id"] != record.cluster_id:
        joined = [
            entry.seq for entry in ledger.entries(NodeJoined) if entry.payload["node_id"] == record.node_id
        ]
        if started.seq > max(joined, default=0):  # the head lost its record, and started a new cluster
            return True
    return record.node_id not in current_members(ledger, record.cluster_id)


def remove_membership(record: ClusterRecord) -> None:
    """Remove the node's record, and the certificates and secrets that it got from the head."""
    keys, tls = local(record.layout.keys), local(record.layout.tls)
    paths = [keys / name for name in SHARED_FILES]
    if not is_foreign_authority(tls / CA_NAME):
        names = (CA_NAME, EDGE_NAME, NODE_CERTIFICATE_NAME, NODE_KEY_NAME)
        paths += [tls / name for name in names]
    for path in paths:
        path.unlink(missing_ok=True)
    Path(record_path(record.storage)).unlink(missing_ok=True)


def leave_membership(record: ClusterRecord, config: PlatformConfig, *, reason: str) -> None:
    """Record that this node has left, and remove what it got from the head.

    The head records it. If the head does not answer, this node writes to the ledger itself.
    """
    try:
        HeadClient.of(record).request("leave", reason=reason)
    except (FalajError, OSError):
        event = NodeLeft(cluster_id=record.cluster_id, node_id=str(record.node_id), reason=reason)
        try:
            open_ledger(config).append(event, actor=current_actor())
        except (sa.exc.SQLAlchemyError, FalajError, OSError) as error:
            print(
                f"warning: neither the head nor the ledger answers, so the cluster still lists this node "
                f"({first_line(error)}). "
                f"Remove it there with `python -m cluster.leave node={record.node_id}`.",
                file=sys.stderr,
            )
    remove_membership(record)
