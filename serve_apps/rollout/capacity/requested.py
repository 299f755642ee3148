"""Which numbers of replicas are requested, computed from the ledger's events by a pure function."""

from __future__ import annotations

import datetime as dt
import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import ReplicasRequested, RolloutPromoted, RolloutRolledBack, VersionKeptWarm
from serve_apps.rollout.history import ROLLBACK_WINDOW_H

KINDS = (ReplicasRequested, RolloutPromoted, RolloutRolledBack, VersionKeptWarm)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A requested number of replicas of one version."""

    rollout: str
    replicas: int
    since: dt.datetime
    until: dt.datetime


Requests = Mapping[tuple[str, int], Request]
"""By model and version."""


def apply(requests: Requests, entry: Entry) -> Requests:
    """Return the requests after one more event.

    A rollback ends the requests of its rollout, also after the promotion. A promotion ends the request for the new
    champion, whose load now says how many replicas it needs. The predecessor's lasts as long as it stays deployed.
    """
    event, at = entry.event(), dt.datetime.fromisoformat(entry.time)
    match event:
        case ReplicasRequested():
            request = Request(
                rollout=event.rollout,
                replicas=event.replicas,
                since=at,
                until=dt.datetime.fromisoformat(event.until),
            )
            return {**requests, (event.model, event.version): request}
        case RolloutRolledBack(rollout=rollout):
            return {key: one for key, one in requests.items() if one.rollout != rollout}
        case RolloutPromoted(model=model, rollout=rollout, version=version):
            until = at + dt.timedelta(hours=ROLLBACK_WINDOW_H)
            return {
                key: replace(one, until=until) if one.rollout == rollout else one
                for key, one in requests.items()
                if key != (model, version)
            }
        case VersionKeptWarm(model=model, rollout=rollout, version=version):
            kept = requests.get((model, version))
            if kept is None or kept.rollout != rollout:
                return requests
            until = at + dt.timedelta(seconds=event.window_s)
            return {**requests, (model, version): replace(kept, until=until)}
        case _:
            return requests


class RequestedReplicas:
    """The requests of a ledger, read incrementally."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._seq = 0
        self._requests: Requests = {}

    def update(self) -> None:
        """Read the new events.

        Raises:
            SQLAlchemyError: The ledger does not answer.
        """
        head = self._ledger.head()
        if head == self._seq:
            return
        streams = [self._ledger.entries(kind, after=self._seq) for kind in KINDS]
        for entry in heapq.merge(*streams, key=lambda one: one.seq):
            if entry.seq <= head:
                self._requests = apply(self._requests, entry)
        self._seq = head

    def find(self, model: str, version: int, *, now: dt.datetime) -> Request | None:
        """Return the request for a version that is in effect now, or None."""
        request = self._requests.get((model, version))
        return request if request is not None and now < request.until else None
