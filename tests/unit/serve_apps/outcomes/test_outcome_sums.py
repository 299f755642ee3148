"""Tests of the sums of outcomes: one event for each model and sender in a minute, not one for each request."""

from __future__ import annotations

import hashlib
from pathlib import Path

import sqlalchemy as sa

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import LedgerEvent, OutcomesReceived, OutcomesSummed
from serve_apps.outcomes.sums import OutcomeSums

NEVER = 3600.0
"""An interval that no test reaches, so that only `flush` and `close` append."""


def test_requests_of_a_minute_become_one_event_for_each_model_and_sender(tmp_path: Path) -> None:
    """The event's digest is a hash of the digests of all these requests. A sender without outcomes gets no event."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.append(OutcomesReceived(model="m", accepted=1, digest="d"), actor="service:old")
    sums = OutcomeSums(ledger.append, interval_s=NEVER)
    for number in range(3):
        sums.add("m", accepted=2, digest=f"d{number}", actor="service:a", at=float(number))
    sums.add("m", accepted=1, digest="e", actor="service:b", at=5.0)
    sums.add("n", accepted=4, digest="f", actor="service:a", at=6.0)
    sums.flush()
    sums.flush()
    entries = list(ledger.entries(OutcomesSummed))
    assert [(entry.actor, entry.payload["model"]) for entry in entries] == [
        ("service:a", "m"),
        ("service:b", "m"),
        ("service:a", "n"),
    ]
    assert entries[0].event() == OutcomesSummed(
        model="m",
        requests=3,
        accepted=6,
        digest=hashlib.sha256(b"d0d1d2").hexdigest(),
        first_at=0.0,
        last_at=2.0,
    )
    [older] = ledger.entries(OutcomesReceived)
    assert older.event() == OutcomesReceived(model="m", accepted=1, digest="d")
    sums.close()


def test_sums_are_appended_at_the_end(tmp_path: Path) -> None:
    """A replica that stops normally loses none."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    sums = OutcomeSums(ledger.append, interval_s=NEVER)
    sums.add("m", accepted=2, digest="d", actor="service:a", at=1.0)
    sums.close()
    assert [entry.payload["accepted"] for entry in ledger.entries(OutcomesSummed)] == [2]


def test_sums_wait_for_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    """When the ledger can be written again, each sum is appended once, in order."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    is_full = True

    def append(event: LedgerEvent, *, actor: str) -> Entry:
        if is_full:
            raise sa.exc.OperationalError("INSERT", None, OSError("disk full"))
        return ledger.append(event, actor=actor)

    sums = OutcomeSums(append, interval_s=NEVER)
    for accepted in (1, 2):
        sums.add("m", accepted=accepted, digest="d", actor="service:a", at=1.0)
        sums.flush()
    assert ledger.head() == 0
    is_full = False
    sums.flush()
    assert [entry.payload["accepted"] for entry in ledger.entries(OutcomesSummed)] == [1, 2]
    sums.close()
