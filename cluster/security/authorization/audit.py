"""What of all decisions is recorded: denials, strangers by their number, permissions by a sample.

A denial names a known principal and is an event of its own, unless the same is denied again and again within a window:
see `denials`. Strangers are counted per time
window and reason, because whoever needs no identity could otherwise fill the ledger. A permission is recorded at most
once per principal, action, resource and window, and only for a share of these, chosen by a hash: the same decision in
the same window is chosen in every process, and an auditor can recompute which ones must be there.

The clock is the caller's: `at` is Unix seconds. The memory is bounded whoever comes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from typing import Protocol

from cluster.ledger.events import AccessDecided, LedgerEvent, StrangersRefused
from cluster.security.authorization.denials import Denials
from cluster.security.authorization.policy import Action, Decision, Resource
from cluster.security.tokens.principal import Principal

OTHER_REASONS = "other"
NOBODY = "unauthenticated"
"""The actor of events about strangers."""
MAX_LOOKED_AT = 10_000
"""Permissions of a window that are known to be recorded already or not of the sample."""
_SCALE = 2**64
_Due = list[tuple[LedgerEvent, str]]
"""Events and their actors."""


class Append(Protocol):
    """Writes an event down: `Ledger.append`."""

    def __call__(self, event: LedgerEvent, *, actor: str) -> object: ...


def is_sampled(principal: Principal, action: Action, resource: Resource, *, window: int, rate: float) -> bool:
    """Whether a permission is of the sample; pure, so that it can be recomputed."""
    return int.from_bytes(_digest(principal, action, resource, window)[:8], "big") < rate * _SCALE


def _digest(principal: Principal, action: Action, resource: Resource, window: int) -> bytes:
    parts = [
        principal.tenant,
        principal.subject,
        action.value,
        resource.tenant,
        resource.kind,
        resource.name,
        window,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


class Decisions:
    """Records decisions through `append`; safe for threads.

    What `append` raises reaches the caller, who has then not recorded a denial and must not answer as if he had.
    """

    def __init__(
        self,
        append: Append,
        *,
        permit_rate: float = 0.01,
        window_s: int = 60,
        max_reasons: int = 32,
        max_permits: int = 1000,
    ) -> None:
        if not 0.0 <= permit_rate <= 1.0:
            raise ValueError(f"permit_rate must be between 0 and 1, got {permit_rate}.")
        if min(window_s, max_reasons) < 1 or max_permits < 0:
            raise ValueError("window_s and max_reasons must be at least 1, max_permits at least 0.")
        self._append = append
        self._rate, self._window_s = permit_rate, window_s
        self._max_reasons, self._max_permits = max_reasons, max_permits
        self._lock = threading.Lock()
        self._window = -1
        self._strangers: dict[str, StrangersRefused] = {}
        self._denials = Denials()
        self._permits: set[bytes] = set()
        self._looked_at: set[tuple[str, str, Action, Resource]] = set()

    def decided(
        self, principal: Principal, action: Action, resource: Resource, decision: Decision, *, at: float
    ) -> None:
        """Record or count a denial; record a permission if it is of the sample, and of the first `max_permits`."""
        with self._lock:
            due = self._turned(at)
            if decision.allowed:
                recorded = self._is_new_sample(principal, action, resource)
            else:
                recorded = self._denials.is_whole(principal, action, resource, at=at)
        self._write(due)
        if recorded:
            self._append(_event(principal, action, resource, decision), actor=principal.subject)

    def unauthenticated(self, reason: str, *, at: float) -> None:
        """Count a stranger; the count is recorded once the window is over."""
        with self._lock:
            due = self._turned(at)
            known = reason in self._strangers or len(self._strangers) < self._max_reasons - 1
            name = reason if known else OTHER_REASONS
            seen = self._strangers.get(name, StrangersRefused(reason=name, count=0, first_at=at, last_at=at))
            self._strangers[name] = StrangersRefused(
                reason=name,
                count=seen.count + 1,
                first_at=min(seen.first_at, at),
                last_at=max(seen.last_at, at),
            )
        self._write(due)

    def flush(self) -> None:
        """Record what was counted so far; call it at the end, and now and then where requests are few."""
        with self._lock:
            due = self._taken()
        self._write(due)

    def _taken(self) -> _Due:
        strangers, self._strangers = self._strangers, {}
        return [*((event, NOBODY) for event in strangers.values()), *self._denials.take()]

    def _turned(self, at: float) -> _Due:
        """What is due because a window is over; a clock that runs backwards opens none."""
        window = int(at // self._window_s)
        if window <= self._window:
            return []
        due = self._taken()
        self._window, self._denials, self._permits, self._looked_at = window, Denials(), set(), set()
        return due

    def _is_new_sample(self, principal: Principal, action: Action, resource: Resource) -> bool:
        asked = (principal.tenant, principal.subject, action, resource)
        if asked in self._looked_at:
            return False
        if len(self._looked_at) < MAX_LOOKED_AT:  # beyond it a decision is only looked at again
            self._looked_at.add(asked)
        if not is_sampled(principal, action, resource, window=self._window, rate=self._rate):
            return False
        digest = _digest(principal, action, resource, self._window)
        if digest in self._permits or len(self._permits) >= self._max_permits:
            return False
        self._permits.add(digest)
        return True

    def _write(self, due: _Due) -> None:
        """Outside the lock: the ledger may be slow."""
        for event, actor in due:
            self._append(event, actor=actor)


def keep_flushed(decisions: Decisions, *, every_s: float, stopped: threading.Event) -> threading.Thread:
    """Record what is counted now and then, though nobody comes to open the next window, and once more at the end."""

    def work() -> None:
        while not stopped.wait(every_s):
            flush()
        flush()

    def flush() -> None:
        try:
            decisions.flush()
        except Exception as error:  # noqa: BLE001 (the ledger may be back at the next turn)
            logging.getLogger(__name__).error("What was counted could not be recorded: %s.", error)

    thread = threading.Thread(target=work, daemon=True, name="strangers")
    thread.start()
    return thread


def _event(principal: Principal, action: Action, resource: Resource, decision: Decision) -> AccessDecided:
    return AccessDecided(
        allowed=decision.allowed,
        role=principal.role.value,
        purpose=principal.purpose,
        tenant=principal.tenant,
        entrypoint=principal.entrypoint,
        action=action.value,
        kind=resource.kind,
        resource=resource.name,
        column_class=resource.column_class,
        policies=list(decision.policies),
    )
