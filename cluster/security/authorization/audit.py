"""Records policy decisions: every denial, the number of unauthenticated requests, and a sample of permissions.

- A denial names a known principal and becomes an event. Repeated denials within a period (`window_s`) are only counted,
see `denials`.
- Unauthenticated requests are counted per period and reason. They need no identity, so with one event for each request,
anyone could fill the ledger.
- A permission is recorded at most once per principal, action, resource and period, and only for a sampled share. The
sample is chosen by a hash. So every process chooses the same permissions, and an auditor can recompute which of them
must be recorded.

The caller supplies the time: `at` is Unix seconds. Memory is bounded for any number of requests.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from typing import NamedTuple, Protocol

from cluster.ledger.events import AccessDecided, LedgerEvent, StrangersRefused
from cluster.security.authorization.denials import DenialLimiter
from cluster.security.authorization.policy import Action, Decision, Policy, Resource
from cluster.security.tokens.principal import Principal

OTHER_REASONS = "other"
UNAUTHENTICATED_ACTOR = "unauthenticated"
"""Actor of events about unauthenticated requests."""
MAX_SEEN_PERMITS = 10_000
"""Largest number of permissions per period that are remembered, so that sampling is decided only once for each."""
_SCALE = 2**64


class _DueEvent(NamedTuple):
    event: LedgerEvent
    actor: str


class Append(Protocol):
    """Function that appends an event to the ledger, such as `Ledger.append`."""

    def __call__(self, event: LedgerEvent, *, actor: str) -> object: ...


def is_sampled(principal: Principal, action: Action, resource: Resource, *, window: int, rate: float) -> bool:
    """Return whether a permission belongs to the sample. This function is pure, so that an auditor can repeat it."""
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


class DecisionRecorder:
    """Records decisions through `append`. It is thread-safe.

    If `append` raises an error, the caller gets the error, and the decision is not recorded. The caller must not answer
    as if the decision were recorded.
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
        self._unauthenticated: dict[str, StrangersRefused] = {}
        self._denials = DenialLimiter()
        self._permits: set[bytes] = set()
        self._seen_permits: set[tuple[str, str, Action, Resource]] = set()

    def record_decision(
        self, principal: Principal, action: Action, resource: Resource, decision: Decision, *, at: float
    ) -> None:
        """Record or count a denial.

        Record a permission if it is sampled and among the first `max_permits` of the period.
        """
        with self._lock:
            due = self._start_window(at)
            if decision.allowed:
                recorded = self._is_new_sample(principal, action, resource)
            else:
                recorded = self._denials.admit(principal, action, resource, at=at)
        self._write(due)
        if recorded:
            self._append(_event(principal, action, resource, decision), actor=principal.subject)

    def check(
        self,
        policy: Policy,
        principal: Principal,
        action: Action,
        *resources: Resource,
        environment: str = "local",
        at: float,
    ) -> None:
        """Require that a principal may do an action on each resource. Record every decision.

        Raises:
            AccessDenied: the policies do not allow the action on one of the resources.
        """
        for resource in resources:
            decision = policy.decide(principal, action, resource, environment=environment)
            self.record_decision(principal, action, resource, decision, at=at)
            if not decision.allowed:
                policy.check(principal, action, resource, environment=environment)

    def count_unauthenticated(self, reason: str, *, at: float) -> None:
        """Count an unauthenticated request. The count is recorded when the period ends."""
        with self._lock:
            due = self._start_window(at)
            is_tracked = reason in self._unauthenticated or len(self._unauthenticated) < self._max_reasons - 1
            name = reason if is_tracked else OTHER_REASONS
            total = self._unauthenticated.get(
                name, StrangersRefused(reason=name, count=0, first_at=at, last_at=at)
            )
            self._unauthenticated[name] = StrangersRefused(
                reason=name,
                count=total.count + 1,
                first_at=min(total.first_at, at),
                last_at=max(total.last_at, at),
            )
        self._write(due)

    def flush(self) -> None:
        """Record all counts so far. Call this at the end, and regularly if requests are rare."""
        with self._lock:
            due = self._take_counts()
        self._write(due)

    def _take_counts(self) -> list[_DueEvent]:
        unauthenticated, self._unauthenticated = self._unauthenticated, {}
        return [
            *(_DueEvent(event, UNAUTHENTICATED_ACTOR) for event in unauthenticated.values()),
            *(_DueEvent(denials.event, denials.actor) for denials in self._denials.take_counts()),
        ]

    def _start_window(self, at: float) -> list[_DueEvent]:
        """Start a new period if the previous period is over. Return the previous period's counts.

        If the clock goes backwards, no period starts.
        """
        window = int(at // self._window_s)
        if window <= self._window:
            return []
        due = self._take_counts()
        self._window, self._denials, self._permits, self._seen_permits = window, DenialLimiter(), set(), set()
        return due

    def _is_new_sample(self, principal: Principal, action: Action, resource: Resource) -> bool:
        permit = (principal.tenant, principal.subject, action, resource)
        if permit in self._seen_permits:
            return False
        if len(self._seen_permits) < MAX_SEEN_PERMITS:  # above the limit, sampling is decided again
            self._seen_permits.add(permit)
        if not is_sampled(principal, action, resource, window=self._window, rate=self._rate):
            return False
        digest = _digest(principal, action, resource, self._window)
        if digest in self._permits or len(self._permits) >= self._max_permits:
            return False
        self._permits.add(digest)
        return True

    def _write(self, due: list[_DueEvent]) -> None:
        """Append the events. Call this without the lock, because the ledger may be slow."""
        for event, actor in due:
            self._append(event, actor=actor)


def start_flushing(
    decisions: DecisionRecorder, *, every_s: float, stopped: threading.Event
) -> threading.Thread:
    """Start a thread that records counts every `every_s` seconds and once at the end, even if no request arrives."""

    def flush_until_stopped() -> None:
        while not stopped.wait(every_s):
            flush()
        flush()

    def flush() -> None:
        try:
            decisions.flush()
        except Exception as error:  # noqa: BLE001 (the ledger may work again at the next flush)
            logging.getLogger(__name__).error("Counts of decisions could not be recorded: %s.", error)

    thread = threading.Thread(target=flush_until_stopped, daemon=True, name="audit-flush")
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
