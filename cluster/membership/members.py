"""The nodes of a cluster, from the ledger's events."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger.events import NodeJoined, NodeLeft

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


def current_members(ledger: Ledger, cluster_id: str) -> dict[str, Member]:
    """Return the nodes of a cluster besides its head, by id, in the order in which they joined."""
    members: dict[str, Member] = {}
    entries = [entry for kind in (NodeJoined, NodeLeft) for entry in ledger.entries(kind)]
    for entry in sorted(entries, key=lambda entry: entry.seq):
        payload = entry.payload
        if payload["cluster_id"] != cluster_id:
            continue
        if entry.type == NodeLeft.__name__:
            members.pop(payload["node_id"], None)
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
    """The nodes of a running cluster, read again when an unknown certificate is shown, and every few seconds.

    While the ledger's database is down, the last known nodes keep their rights.

    Args:
        ledger: the ledger.
        cluster_id: the cluster.
        clock: returns monotonic seconds.
    """

    def __init__(
        self, ledger: Ledger, cluster_id: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger = ledger
        self._cluster_id = cluster_id
        self._clock = clock
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._read_at = -REFRESH_S

    def all(self, *, fresh: bool = False) -> dict[str, Member]:
        """Return the nodes by id, with `fresh` as the ledger has them now."""
        with self._lock:
            if fresh or self._clock() >= self._read_at + REFRESH_S:
                try:
                    self._members = current_members(self._ledger, self._cluster_id)
                except sa.exc.SQLAlchemyError as error:
                    LOG.warning("the nodes cannot be read from the ledger: %s", error)
                self._read_at = self._clock()
            return dict(self._members)

    def with_certificate(self, fingerprint: str) -> Member | None:
        """Return the node with a certificate, or None. Only a node has one, so an unknown one is looked up at once."""
        for fresh in (False, True):
            for member in self.all(fresh=fresh).values():
                if member.certificate == fingerprint:
                    return member
        return None
