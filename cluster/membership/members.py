"""The nodes of a cluster, from the ledger's events."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace

import sqlalchemy as sa

from cluster.errors import first_line
from cluster.ledger import Ledger
from cluster.ledger.events import NodeCertificateRenewed, NodeJoined, NodeLeft

HEAD = "head"
"""Name of the head in the list of nodes. No other node may have it."""
REFRESH_S = 5.0
LOG = logging.getLogger("falaj.nodes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A node that joined and has not left."""

    node_id: str
    name: str
    address: str
    region: str
    certificate: str
    """SHA-256 of its certificate, in hex."""
    joined_at: str
    earlier: tuple[str, ...] = ()
    """SHA-256 of its earlier certificates. They are accepted until they expire, because the answer with the new one may
    be lost, and because open connections continue with the old one."""
    renewed_at: str | None = None
    """Ledger time of the last renewal."""


def current_members(ledger: Ledger, cluster_id: str) -> dict[str, Member]:
    """Return the nodes of a cluster besides its head, by id, in the order in which they joined."""
    members: dict[str, Member] = {}
    kinds = (NodeJoined, NodeCertificateRenewed, NodeLeft)
    entries = [entry for kind in kinds for entry in ledger.entries(kind)]
    for entry in sorted(entries, key=lambda entry: entry.seq):
        payload = entry.payload
        if payload["cluster_id"] != cluster_id:
            continue
        if entry.type == NodeLeft.__name__:
            members.pop(payload["node_id"], None)
            continue
        if entry.type == NodeCertificateRenewed.__name__:
            if (member := members.get(payload["node_id"])) is not None:
                members[member.node_id] = replace(
                    member,
                    certificate=payload["certificate"],
                    earlier=(*member.earlier, member.certificate),
                    renewed_at=entry.time,
                )
            continue
        members[payload["node_id"]] = Member(
            node_id=payload["node_id"],
            name=payload["name"],
            address=payload["address"],
            region=payload["region"],
            certificate=payload["certificate"],
            joined_at=entry.time,
        )
    return members


class Members:
    """The nodes of a running cluster, read again every few seconds, and when an unknown certificate is shown.

    Requests of known nodes never wait for the ledger. While its database is down, the last known nodes keep their
    rights.
    """

    def __init__(self, ledger: Ledger, cluster_id: str) -> None:
        self._ledger = ledger
        self._cluster_id = cluster_id
        self._members: dict[str, Member] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the nodes from the ledger."""
        try:
            self._members = current_members(self._ledger, self._cluster_id)
        except sa.exc.SQLAlchemyError as error:
            LOG.warning("the nodes cannot be read from the ledger: %s", first_line(error))

    def follow(self, stopped: threading.Event) -> None:
        """Refresh every few seconds until `stopped` is set."""
        while not stopped.wait(REFRESH_S):
            self.refresh()

    def all(self) -> dict[str, Member]:
        """Return the nodes by id."""
        return dict(self._members)

    def with_certificate(self, fingerprint: str) -> Member | None:
        """Return the node with a certificate, or None."""
        found = self._find(fingerprint)
        if found is None:
            self.refresh()
            found = self._find(fingerprint)
        return found

    def _find(self, fingerprint: str) -> Member | None:
        members = self._members.values()
        return next(
            (each for each in members if fingerprint == each.certificate or fingerprint in each.earlier), None
        )
