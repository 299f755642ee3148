"""A rollback of the rollout of `tests.samples.policies`, as a machine's journal has it."""

from __future__ import annotations

from pathlib import Path

from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.outage.journal import Journal, JournaledRollback
from tests.samples.policies import FAILING

KEY = b"key"
ROLLBACK = JournaledRollback(
    id="1",
    model="m",
    rollout="r",
    version=2,
    fallback=1,
    reasons=["failure: 40 units of the treatment and 0 of control"],
    evidence=as_json(FAILING),
    decided_at="2026-11-30T00:00:00+00:00",
)


def new_journal(folder: Path) -> Journal:
    """Return the journal of a folder."""
    return Journal(folder / "rollbacks.journal", KEY)


def journaled(folder: Path) -> Journal:
    """Return a journal with the rollback."""
    journal = new_journal(folder)
    journal.append(ROLLBACK)
    return journal
