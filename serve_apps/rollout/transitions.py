"""The events of each change of a rollout. They are appended in one transaction, and only if nothing changed meanwhile.

Commands and the controller use the same functions, so a promotion has the same events whoever decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import RolloutError
from cluster.ledger import Entry, Ledger
from cluster.ledger.events import (
    AliasMoved,
    LedgerEvent,
    PolicyEnded,
    RolloutPromoted,
    RolloutRolledBack,
    ShadowStopped,
)
from cluster.registry import CHAMPION
from serve_apps.rollout.history import History, PolicyRun, Promotion, concerns, is_relevant


def append(
    ledger: Ledger, model: str, events: Sequence[LedgerEvent], *, actor: str, since: int
) -> list[Entry] | None:
    """Append the events of one change of a model. Return None if the model's rollout changed since the caller read it.

    Args:
        ledger: The ledger.
        model: The model.
        events: The events.
        actor: Who acts.
        since: `ledger.head()` before the caller read the state.
    """
    return ledger.append_unless_changed(
        events, actor=actor, since=since, types=is_relevant, concerns=lambda entry: concerns(entry, model)
    )


def require_appended(entries: list[Entry] | None, model: str) -> int:
    """Return the last `seq` of appended events.

    Raises:
        RolloutError: they were not appended.
    """
    if entries is None:
        raise RolloutError(
            f"The rollout of '{model}' changed while this command ran, so nothing was done. Look at "
            "`action=show`, and try again."
        )
    return entries[-1].seq


def promotion(
    model: str, *, rollout: str, version: int, champion: int | None, reason: str, run: PolicyRun | None
) -> list[LedgerEvent]:
    """Return the events that make the treatment the champion.

    First comes the alias and then the end of the rollout, so no unit goes back to the old champion.
    """
    return [
        AliasMoved(name=model, alias=CHAMPION, version=version, previous=champion, reason=reason),
        RolloutPromoted(model=model, rollout=rollout, version=version),
        *_end(model, run, outcome="promoted", reason=reason),
    ]


def rollback(
    model: str, *, rollout: str, reason: str, run: PolicyRun | None, outcome: str = "rolled_back"
) -> list[LedgerEvent]:
    """Return the events that end a running rollout and send every unit to the champion."""
    return [
        RolloutRolledBack(model=model, rollout=rollout, reason=reason),
        *_end(model, run, outcome=outcome, reason=reason),
    ]


def rollback_of_promotion(
    model: str, history: History, promoted: Promotion, *, reason: str
) -> list[LedgerEvent]:
    """Return the events that make the champion before a promotion the champion again."""
    return [
        AliasMoved(
            name=model,
            alias=CHAMPION,
            version=promoted.predecessor,
            previous=history.champion,
            reason=f"rollout {promoted.rollout} rolled back after its promotion: {reason}",
        ),
        RolloutRolledBack(model=model, rollout=promoted.rollout, reason=reason),
    ]


def _end(model: str, run: PolicyRun | None, *, outcome: str, reason: str) -> list[LedgerEvent]:
    if run is None:
        return []
    stopped = ShadowStopped(model=model, version=run.version, reason=reason)
    return [
        PolicyEnded(
            model=model,
            rollout=run.rollout,
            version=run.version,
            outcome=outcome,
            reason=reason,
            starter=run.subject,
            started_at=run.started_at,
            weight=run.weight,
            decisions=run.decisions,
        ),
        *([stopped] if run.is_shadow else []),
    ]
