"""Limits how many denials of a period become events. Further denials are counted by principal and action.

Without a limit, a program that repeats a denied request would fill the ledger. The limit is per resource, so repeated
denials for one resource do not hide denials for another resource.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from cluster.ledger.events import DenialsCounted
from cluster.security.authorization.policy import Action, Resource
from cluster.security.tokens.principal import Principal

MAX_EVENTS_PER_RESOURCE = 5
"""Largest number of events of one principal, action and resource."""
MAX_EVENTS_PER_ACTION = 100
"""Largest number of events of one principal and action, because a principal can invent names of resources."""
MAX_TRACKED = 1_000
"""Largest number of tracked pairs of principal and action. All denials of further pairs become events. Further pairs
are rare, because each principal needs its own token."""


class _Key(NamedTuple):
    tenant: str
    subject: str
    action: Action


class CountedDenials(NamedTuple):
    """An event with the number of further denials, and its actor."""

    event: DenialsCounted
    actor: str


class DenialLimiter:
    """Decides for each denial of one period whether it becomes an event. Not thread-safe."""

    def __init__(self) -> None:
        self._events: Counter[_Key] = Counter()
        self._events_of_resource: Counter[tuple[_Key, Resource]] = Counter()
        self._counted: dict[_Key, DenialsCounted] = {}

    def admit(self, principal: Principal, action: Action, resource: Resource, *, at: float) -> bool:
        """Return whether a denial becomes an event of its own. If not, count it.

        Args:
            principal: who was denied.
            action: the denied action.
            resource: the resource of the action.
            at: Unix seconds.
        """
        key = _Key(principal.tenant, principal.subject, action)
        if key not in self._events and len(self._events) >= MAX_TRACKED:
            return True
        if (
            self._events[key] < MAX_EVENTS_PER_ACTION
            and self._events_of_resource[key, resource] < MAX_EVENTS_PER_RESOURCE
        ):
            self._events[key] += 1
            self._events_of_resource[key, resource] += 1
            return True
        first = DenialsCounted(tenant=principal.tenant, action=action.value, count=0, first_at=at, last_at=at)
        total = self._counted.get(key, first)
        self._counted[key] = replace(
            total,
            count=total.count + 1,
            first_at=min(total.first_at, at),
            last_at=max(total.last_at, at),
        )
        return False

    def take_counts(self) -> list[CountedDenials]:
        """Return the denials counted since the last call, and reset the counts."""
        counted, self._counted = self._counted, {}
        return [CountedDenials(event, key.subject) for key, event in counted.items()]
