"""Delivers events to the webhook, each at least once and in order. It runs in a thread, so it delays no decision.

The position is stored after an event was taken. If the process is killed in between, the event is sent again, with the
same `Idempotency-Key`. A receiver that fails is tried again, with pauses of up to five minutes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from prometheus_client import Gauge

from cluster.errors import first_line
from cluster.ledger import Entry, Ledger
from cluster.ledger.events import PolicySummarised, QualityJudged, WatchEnded
from cluster.ledger.store import utc_now
from serve_apps.rollout.controller.webhook import Webhook

EVERY_S = 1.0
MAX_PAUSE_S = 300.0
KEEP_TRYING = dt.timedelta(days=3)
"""An event that nobody takes for so long is left out, so that later ones are delivered. The ledger still has it."""
KINDS = (PolicySummarised, WatchEnded, QualityJudged)
LOG = logging.getLogger("falaj.rollouts")
METADATA = sa.MetaData()
POSITIONS = sa.Table(
    "rollout_webhooks",
    METADATA,
    sa.Column("receiver", sa.String(64), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
)
"""Up to which event each receiver has got all events. A receiver is known by the hash of its URL."""


class Deliverer:
    """Sends the events after a stored position.

    Args:
        ledger: The ledger. Its database also has the position.
        webhook: The receiver. A new one gets only the events from its first start on.
        acts: Returns whether this controller is the one that acts.
        waiting: Gauge of the number of events that wait.
        clock: Returns the time, in UTC.
    """

    def __init__(
        self,
        ledger: Ledger,
        webhook: Webhook,
        *,
        acts: Callable[[], bool],
        waiting: Gauge,
        clock: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        self._ledger = ledger
        self._webhook = webhook
        self._acts = acts
        self._waiting = waiting
        self._clock = clock
        self._receiver = hashlib.sha256(webhook.url.encode()).hexdigest()
        self._is_failing = False
        self._looked_until = 0
        with ledger.writing() as connection:
            METADATA.create_all(connection)

    def run(self, stopped: threading.Event) -> None:
        """Deliver until `stopped` is set. No failure ends it; after each, the pause is twice as long."""
        pause_s = EVERY_S
        while not stopped.wait(pause_s):
            pause_s = EVERY_S if self.deliver_once() else min(2 * pause_s, MAX_PAUSE_S)

    def deliver_once(self) -> bool:
        """Send all new events. Return False if one could not be sent; then it and the later ones wait."""
        try:
            if self._acts():
                self._deliver()
        except Exception as error:  # noqa: BLE001 (any failure is tried again)
            if not self._is_failing:  # one line for each outage
                LOG.warning("the webhook cannot be called: %s", first_line(error))
            self._is_failing = True
            return False
        self._is_failing = False
        return True

    def _deliver(self) -> None:
        position, head = max(self._position(), self._looked_until), self._ledger.head()
        if position >= head:
            return
        waiting = list(self._events(position))
        self._waiting.set(len(waiting))
        for number, entry in enumerate(waiting, start=1):
            self._send(entry)
            self._store(entry.seq)
            self._waiting.set(len(waiting) - number)
        self._looked_until = head

    def _send(self, entry: Entry) -> None:
        try:
            self._webhook.send(entry)
        except Exception:
            if self._clock() - dt.datetime.fromisoformat(entry.time) < KEEP_TRYING:
                raise
            LOG.error("event %d is not sent to the webhook any more", entry.seq)

    def _events(self, position: int) -> Iterator[Entry]:
        found = [entry for kind in KINDS for entry in self._ledger.entries(kind, after=position)]
        yield from sorted(found, key=lambda entry: entry.seq)

    def _position(self) -> int:
        """Return the stored position. A new receiver starts at the ledger's head."""
        mine = sa.select(POSITIONS.c.seq).where(POSITIONS.c.receiver == self._receiver)
        with self._ledger.engine.connect() as connection:
            stored = connection.execute(mine).scalar_one_or_none()
        if stored is not None:
            return int(stored)
        head = self._ledger.head()
        with self._ledger.writing() as connection:
            if connection.execute(mine).first() is None:
                connection.execute(POSITIONS.insert().values(receiver=self._receiver, seq=head))
        return head

    def _store(self, seq: int) -> None:
        values: dict[str, Any] = {"seq": seq}
        mine = (POSITIONS.c.receiver == self._receiver) & (POSITIONS.c.seq < seq)
        with self._ledger.writing() as connection:
            connection.execute(POSITIONS.update().where(mine).values(values))
