"""The events of each change of a rollout. They are appended in one transaction, and only if nothing changed meanwhile.

Commands and the controller use the same functions, so a promotion has the same events whoever decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import RolloutError
from cluster.ledger import Entry, Ledger
from cluster.ledger.events import (
    AliasMoved,
    LedgerEvent,
    PolicyEnded,
    RolloutPromoted,
    RolloutRolledBack,
    ShadowStopped,
    VersionKeptWarm,
    WatchEnded,
    WatchStarted,
)
from cluster.registry import CHAMPION
from serve_apps.rollout.history import (
    ROLLBACK_WINDOW_H,
    History,
    PolicyRun,
    Promotion,
    concerns,
    is_relevant,
)
from serve_apps.rollout.serving_state import Rollout

ACTOR = "system:rollouts"
"""Actor of what the controller appends."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """A running rollout that ends."""

    model: str
    rollout: Rollout
    run: PolicyRun | None
    """None without a policy."""
    reason: str

    def end_of_policy(self, outcome: str) -> list[LedgerEvent]:
        """Return the event that ends the policy; none without one."""
        run = self.run
        if run is None:
            return []
        ended = PolicyEnded(
            model=self.model,
            rollout=run.rollout,
            version=run.version,
            outcome=outcome,
            reason=self.reason,
            starter=run.subject,
            started_at=run.started_at,
            weight=run.weight,
            decisions=run.decisions,
            steps=run.steps,
        )
        stopped = ShadowStopped(model=self.model, version=run.version, reason=self.reason)
        return [ended, stopped] if run.is_shadow else [ended]

    @property
    def window_s(self) -> float:
        """Time for which the version without requests stays deployed, in seconds."""
        if self.run is None:
            return ROLLBACK_WINDOW_H * 3600
        return float(self.run.plan["policy"]["watch_s"])


def promotion(ending: Ending, *, champion: int | None) -> list[LedgerEvent]:
    """Return the events that make the treatment the champion.

    First comes the alias and then the end of the rollout, so no unit goes back to the old champion.
    """
    model, rollout = ending.model, ending.rollout
    version = rollout.treatment_version
    events: list[LedgerEvent] = [
        AliasMoved(name=model, alias=CHAMPION, version=version, previous=champion, reason=ending.reason),
        RolloutPromoted(model=model, rollout=rollout.id, version=version),
        *ending.end_of_policy("promoted"),
    ]
    if champion is not None:
        events += [*_watch(ending, champion), *_kept_warm(ending, champion)]
    return events


def rollback(ending: Ending, *, outcome: str = "rolled_back") -> list[LedgerEvent]:
    """Return the events that end a running rollout and send every unit to the champion."""
    return [
        RolloutRolledBack(model=ending.model, rollout=ending.rollout.id, reason=ending.reason),
        *ending.end_of_policy(outcome),
        *_kept_warm(ending, ending.rollout.treatment_version),
    ]


def rollback_of_promotion(
    model: str, history: History, promoted: Promotion, *, reason: str
) -> list[LedgerEvent]:
    """Return the events that make the champion before a promotion the champion again."""
    rollout, watch = promoted.rollout, history.watch
    window_s = ROLLBACK_WINDOW_H * 3600 if watch is None else watch.watch_s
    events: list[LedgerEvent] = [
        AliasMoved(
            name=model,
            alias=CHAMPION,
            version=promoted.predecessor,
            previous=history.champion,
            reason=f"rollout {rollout} rolled back after its promotion: {reason}",
        ),
        RolloutRolledBack(model=model, rollout=rollout, reason=reason),
    ]
    if watch is not None:
        events.append(WatchEnded(model=model, rollout=rollout, outcome="rolled_back", reason=reason))
    return [
        *events,
        VersionKeptWarm(model=model, rollout=rollout, version=promoted.version, window_s=window_s),
    ]


def _watch(ending: Ending, champion: int) -> list[LedgerEvent]:
    """Return the event that starts the watch of a promotion; none without a policy, or if it takes no time."""
    if ending.run is None or ending.window_s == 0:
        return []
    started = WatchStarted(
        model=ending.model,
        rollout=ending.rollout.id,
        version=ending.rollout.treatment_version,
        predecessor=champion,
        salt=ending.rollout.salt,
        unit=ending.rollout.unit,
        holdback=bool(ending.run.plan["policy"].get("holdback", False)),
        watch_s=ending.window_s,
    )
    return [started]


def _kept_warm(ending: Ending, version: int) -> list[LedgerEvent]:
    """Return the event that keeps a version without requests deployed for some time."""
    return [
        VersionKeptWarm(
            model=ending.model, rollout=ending.rollout.id, version=version, window_s=ending.window_s
        )
    ]
