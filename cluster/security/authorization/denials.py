"""Which denials of a window are events of their own; the others are counted, by principal and action.

Somebody's program that asks again and again for what it may not have would else fill the ledger. The first of each
resource are whole, so that noise about one thing hides nothing about another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from cluster.ledger.events import DenialsCounted
from cluster.security.authorization.policy import Action, Resource
from cluster.security.tokens.principal import Principal

MAX_OF_ONE = 5
"""Of one principal, action and resource."""
MAX_OF_ACTION = 100
"""Of one principal and action, whatever the resource: he may make names up."""
MAX_KNOWN = 1_000
"""Principals and actions that are told apart. Each has a token of its own; denials of more are whole again."""

_Who = tuple[str, str, Action]


class Denials:
    """Those of one window; whoever has it takes care of threads."""

    def __init__(self) -> None:
        self._whole: Counter[_Who] = Counter()
        self._of_one: Counter[tuple[_Who, Resource]] = Counter()
        self._counted: dict[_Who, DenialsCounted] = {}

    def is_whole(self, principal: Principal, action: Action, resource: Resource, *, at: float) -> bool:
        """Whether a denial is an event of its own; if not, it has been counted.

        Args:
            principal, action, resource: who may not do what.
            at: Unix seconds.
        """
        who = (principal.tenant, principal.subject, action)
        if who not in self._whole and len(self._whole) >= MAX_KNOWN:
            return True
        if self._whole[who] < MAX_OF_ACTION and self._of_one[who, resource] < MAX_OF_ONE:
            self._whole[who] += 1
            self._of_one[who, resource] += 1
            return True
        first = DenialsCounted(tenant=principal.tenant, action=action.value, count=0, first_at=at, last_at=at)
        seen = self._counted.get(who, first)
        self._counted[who] = replace(
            seen, count=seen.count + 1, first_at=min(seen.first_at, at), last_at=max(seen.last_at, at)
        )
        return False

    def take(self) -> list[tuple[DenialsCounted, str]]:
        """What has been counted since this was last asked, each with its actor."""
        counted, self._counted = self._counted, {}
        return [(event, subject) for (_, subject, _), event in counted.items()]
