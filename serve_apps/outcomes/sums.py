"""Once a minute, append the number of accepted outcomes of each model and sender to the ledger.

The outcome log is the complete record. Outcomes are durable in the log before a request is answered. The ledger gets
one event for each model and sender in a minute, not for each request, so it does not grow with traffic. A killed
replica loses the sums of at most a minute. But the outcomes stay in the log, and `OutcomesCompacted` counts them.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from cluster.ledger.events import OutcomesSummed
from cluster.security.authorization.audit import Append
from serve_apps.replica.http import LOG

INTERVAL_S = 60.0
"""Seconds from one event to the next, for each model and sender."""
CLOSE_S = 5.0


@dataclass(slots=True)
class _Sum:
    first_at: float
    last_at: float
    requests: int = 0
    accepted: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class OutcomeSums:
    """Counts accepted outcomes, and appends their sums to the ledger.

    Args:
        append: appends an event to the ledger.
        interval_s: seconds from one append to the next.
    """

    def __init__(self, append: Append, *, interval_s: float = INTERVAL_S) -> None:
        self._append = append
        self._interval_s = interval_s
        self._sums: dict[tuple[str, str], _Sum] = {}
        self._pending: list[tuple[str, OutcomesSummed]] = []
        """Sums that are not in the ledger yet, in order: actor and event."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._appender = threading.Thread(target=self._append_often, daemon=True, name="outcome sums")
        self._appender.start()

    def add(self, model: str, *, accepted: int, digest: str, actor: str, at: float) -> None:
        """Count one request, whose outcomes are in the log.

        Args:
            model: name of the model.
            accepted: number of outcomes.
            digest: SHA-256 of the outcomes.
            actor: sender of the request.
            at: time of the request, Unix seconds.
        """
        with self._lock:
            current = self._sums.setdefault((model, actor), _Sum(first_at=at, last_at=at))
            current.last_at = at
            current.requests += 1
            current.accepted += accepted
            current.digest.update(digest.encode())

    def flush(self) -> None:
        """Append an event for each model and sender. Events that cannot be appended are appended at the next call.

        Only one thread may call this.
        """
        with self._lock:
            sums, self._sums = self._sums, {}
        self._pending += [(actor, _event(model, sent)) for (model, actor), sent in sums.items()]
        try:
            while self._pending:
                actor, event = self._pending[0]
                self._append(event, actor=actor)
                del self._pending[0]
        except sa.exc.SQLAlchemyError as error:  # for example, a full disk
            LOG.warning("sums of outcomes cannot be appended to the ledger, and are kept: %s", error)

    def close(self) -> None:
        """Append the last sums."""
        self._closed.set()
        self._appender.join(CLOSE_S)

    def _append_often(self) -> None:
        while not self._closed.wait(self._interval_s):
            self.flush()
        self.flush()


def _event(model: str, sent: _Sum) -> OutcomesSummed:
    return OutcomesSummed(
        model=model,
        requests=sent.requests,
        accepted=sent.accepted,
        digest=sent.digest.hexdigest(),
        first_at=sent.first_at,
        last_at=sent.last_at,
    )
