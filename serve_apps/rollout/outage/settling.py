"""Appends the journal's rollbacks to the ledger when it answers again. The ledger wins if a rollout ended otherwise."""

from __future__ import annotations

import logging
import socket
from dataclasses import replace

import sqlalchemy as sa

from cluster.errors import RolloutError, first_line
from cluster.ledger import Ledger
from cluster.ledger.events import (
    LedgerEvent,
    RollbackJournaled,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutStarted,
)
from serve_apps.rollout import transitions
from serve_apps.rollout.history import History, read_history
from serve_apps.rollout.outage.journal import Journal, JournaledRollback
from serve_apps.rollout.serving_state import ModelState, Rollout, read_states

APPLIED, ALREADY, CONFLICT = "applied", "already_rolled_back", "conflict"
"""What became of a journaled rollback in the ledger."""
DROPPED = "dropped, because the ledger has no such rollout"
_TRIES = 5
LOG = logging.getLogger("falaj.rollouts")


def settle(ledger: Ledger, journal: Journal, *, actor: str) -> None:
    """Append what the journal has, then empty it. Idempotent: a rollback with the same id is appended once.

    If one cannot be appended for another reason than an outage, the journal stays and the next call tries again.

    Raises:
        SQLAlchemyError: The ledger does not answer. The journal stays.
        ConfigError, OSError: The journal cannot be read or written.
    """
    rollbacks = journal.read()
    if not rollbacks:
        return
    known = {entry.payload["id"] for entry in ledger.entries(RollbackJournaled)}
    failed = False
    for rollback in rollbacks:
        if rollback.id in known:
            continue
        try:
            LOG.warning("journaled rollback of %s: %s", rollback.rollout, _append(ledger, rollback, actor))
        except Exception as error:  # any failure of one: it must not stop the others
            if isinstance(error, sa.exc.SQLAlchemyError) and not isinstance(error, sa.exc.DataError):
                raise
            failed = True
            LOG.error(
                "the journaled rollback of %s was not appended: %s", rollback.rollout, first_line(error)
            )
    if not failed:
        journal.clear(rollbacks)


def _append(ledger: Ledger, rollback: JournaledRollback, actor: str) -> str:
    """Append a rollback, and return its outcome. One of a rollout that the ledger does not have is dropped.

    Raises:
        RolloutError: The model's rollout changed again and again meanwhile.
    """
    for _ in range(_TRIES):
        since = ledger.head()
        history = read_history(ledger, rollback.model)
        outcome = _outcome(ledger, history, rollback)
        if outcome == DROPPED:
            return outcome
        rollout = read_states(ledger).get(rollback.model, ModelState()).rollout
        events = _events(history, rollout, rollback, outcome)
        if transitions.append(ledger, rollback.model, events, actor=actor, since=since) is not None:
            return outcome
    raise RolloutError(f"The rollout of '{rollback.model}' changed {_TRIES} times meanwhile.")


def _outcome(ledger: Ledger, history: History, rollback: JournaledRollback) -> str:
    """Return what becomes of a rollback. A promotion can be older than the model's last one."""
    if history.started is not None and history.started["rollout"] == rollback.rollout:
        return APPLIED

    def has(kind: type[LedgerEvent]) -> bool:
        return any(entry.payload["rollout"] == rollback.rollout for entry in ledger.entries(kind))

    if has(RolloutPromoted) and not has(RolloutRolledBack):
        return CONFLICT
    return ALREADY if has(RolloutStarted) else DROPPED


def _events(
    history: History, rollout: Rollout | None, rollback: JournaledRollback, outcome: str
) -> list[LedgerEvent]:
    journaled = RollbackJournaled(
        id=rollback.id,
        model=rollback.model,
        rollout=rollback.rollout,
        version=rollback.version,
        fallback=rollback.fallback,
        reasons=rollback.reasons,
        evidence=rollback.evidence,
        decided_at=rollback.decided_at,
        machine=socket.gethostname(),
        outcome=outcome,
    )
    if outcome != APPLIED or rollout is None:
        return [journaled]
    run = None if history.run is None else replace(history.run, decisions=history.run.decisions + 1)
    reason = f"while the ledger did not answer: {'; '.join(rollback.reasons)}"
    ending = transitions.Ending(model=rollback.model, rollout=rollout, run=run, reason=reason)
    return [journaled, *transitions.rollback(ending)]
