"""What the ledger says about the rollouts of a model that serving does not need: policy, decisions, last promotion.

A projection stores it, so a command or the controller applies only new events. It is exact: each event is applied once.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from cluster.known_fields import known_fields
from cluster.ledger import Entry, Ledger
from cluster.ledger.events import (
    AliasMoved,
    DeploymentRemoved,
    LedgerEvent,
    PolicyDecided,
    PolicyEnded,
    PolicyPaused,
    PolicyResumed,
    PolicyStarted,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutStarted,
    RolloutWeightChanged,
    ShadowStarted,
    Subject,
    VersionKeptWarm,
    WatchDecided,
    WatchEnded,
    WatchStarted,
    require_known,
)
from cluster.ledger.projection import Projection
from cluster.registry import CHAMPION

ROLLBACK_WINDOW_H = 24.0
"""Hours after a promotion in which a rollback takes it back, by default."""
INCONCLUSIVE = "inconclusive"
"""`Verdict.inconclusive`. The verdicts need SciPy, which is slow to import."""
_POLICY_EVENTS = (PolicyStarted, PolicyDecided, PolicyPaused, PolicyResumed, PolicyEnded)
_WATCH_EVENTS = (WatchStarted, WatchDecided, WatchEnded, VersionKeptWarm)
_TYPES = frozenset(kind.__name__ for kind in (*_POLICY_EVENTS, *_WATCH_EVENTS))


@dataclass(frozen=True, kw_only=True, slots=True)
class LastDecision:
    """The controller's last recorded decision."""

    at: str
    verdict: str
    step: int
    reasons: list[str]
    missing: list[str]
    not_done: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyRun:
    """A running rollout that follows a policy."""

    rollout: str
    version: int
    policy: str
    plan: dict[str, Any]
    slow_ms: float | None
    scoring: dict[str, Any]
    starter: dict[str, Any]
    """The principal that started it."""
    started_at: str
    weight: float
    step_started_at: str
    is_paused: bool = False
    is_inconclusive: bool = False
    """The deadline was over and something was missing. This is final, except for a rollback."""
    decisions: int = 0
    last: LastDecision | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Weight and start of each step so far."""

    @property
    def is_shadow(self) -> bool:
        """Whether the version gets only copies of requests."""
        return bool(self.plan["policy"].get("is_shadow"))

    @property
    def subject(self) -> str:
        """The starter's name."""
        return str(self.starter["subject"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """The last promotion by a rollout."""

    rollout: str
    version: int
    predecessor: int
    """The champion before it."""
    at: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchRun:
    """The controller judges the new champion after a promotion."""

    run: PolicyRun
    """The rollout as it was at its promotion."""
    predecessor: int
    started_at: str
    """Time of the promotion."""
    watch_s: float
    holdback: bool
    last: LastDecision | None = None

    @property
    def until(self) -> dt.datetime:
        """When it ends."""
        return dt.datetime.fromisoformat(self.started_at) + dt.timedelta(seconds=self.watch_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Warm:
    """A version without requests that stays deployed until a time."""

    version: int
    rollout: str
    until: str


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The rollouts of one model."""

    champion: int | None = None
    previous: int | None = None
    """The champion before the present one."""
    started: dict[str, Any] | None = None
    """Id, weight and start of the running rollout."""
    run: PolicyRun | None = None
    promotion: Promotion | None = None
    """None also after it was rolled back."""
    ended: PolicyRun | None = None
    """The last rollout with a policy, as it was at its end; None after the next start."""
    watch: WatchRun | None = None
    warm: tuple[Warm, ...] = ()

    def warm_predecessor(self, now: dt.datetime) -> int | None:
        """Return the version that a rollback of the last promotion would need now, or None."""
        promotion = self.promotion
        if promotion is None or promotion.version != self.champion:
            return None
        return promotion.predecessor if now <= self.rollback_until(promotion) else None

    def rollback_until(self, promotion: Promotion) -> dt.datetime:
        """Return until when a promotion can be taken back: while its predecessor stays deployed."""
        kept = next((one for one in self.warm if one.rollout == promotion.rollout), None)
        if kept is not None:
            return dt.datetime.fromisoformat(kept.until)
        return dt.datetime.fromisoformat(promotion.at) + dt.timedelta(hours=ROLLBACK_WINDOW_H)


METADATA = sa.MetaData()
HISTORIES = sa.Table(
    "rollout_histories_2",
    METADATA,
    sa.Column("model", sa.String(128), primary_key=True),
    sa.Column("is_followed", sa.Boolean, nullable=False, index=True),
    sa.Column("history", sa.Text, nullable=False),
)
"""A release that computes the histories differently must change the number in the table's name."""


def step_at(weights: Sequence[float], weight: float) -> int:
    """Return the position of the last step whose weight is at most this weight, or 0.

    A weight between two steps was set by a command of an older release.
    """
    return max(sum(one <= weight for one in weights) - 1, 0)


def is_relevant(type_name: str) -> bool:
    """Return whether events of a type can change a history, or what is served."""
    return type_name in _TYPES or Subject.serving.includes(type_name)


def concerns(entry: Entry, model: str) -> bool:
    """Return whether an event is about a model."""
    return model in (entry.payload.get("model"), entry.payload.get("name"))


def apply(history: History, event: LedgerEvent, *, time: str) -> History:
    """Return a model's history after one more event of this model.

    Raises:
        ReleaseTooOld: a newer release wrote the event, and it changes what is served.
    """
    require_known(event, Subject.serving)
    run = history.run
    match event:
        case AliasMoved(alias=alias, version=version) if alias == CHAMPION and version != history.champion:
            return replace(_in_use(history, version), champion=version, previous=history.champion, watch=None)
        case RolloutStarted():
            started = {"rollout": event.rollout, "weight": event.weight, "at": time}
            used = _in_use(history, event.treatment_version)
            return replace(used, started=started, run=None, ended=None, watch=None)
        case ShadowStarted(version=version):
            return _in_use(history, version)
        case DeploymentRemoved(version=version):
            removed = _in_use(history, version)
            is_held = removed.watch is not None and removed.watch.predecessor == version
            return replace(removed, watch=None) if is_held else removed
        case WatchStarted() | WatchDecided() | WatchEnded() | VersionKeptWarm():
            return _apply_after_end(history, event, time=time)
        case PolicyStarted() if history.started and history.started["rollout"] == event.rollout:
            return replace(
                history,
                run=PolicyRun(
                    rollout=event.rollout,
                    version=event.version,
                    policy=event.policy,
                    plan=event.plan,
                    slow_ms=event.slow_ms,
                    scoring=event.scoring,
                    starter=event.starter,
                    started_at=history.started["at"],
                    weight=history.started["weight"],
                    step_started_at=history.started["at"],
                    steps=[{"weight": history.started["weight"], "at": history.started["at"]}],
                ),
            )
        case RolloutPromoted(rollout=rollout, version=version) if _runs(history, rollout):
            promotion = None
            if history.champion == version and history.previous is not None:
                promotion = Promotion(rollout=rollout, version=version, predecessor=history.previous, at=time)
            return replace(history, started=None, run=None, promotion=promotion, ended=run)
        case RolloutRolledBack(rollout=rollout) if _runs(history, rollout):
            return replace(history, started=None, run=None, ended=run)
        case RolloutRolledBack(rollout=rollout) if (
            history.promotion is not None and history.promotion.rollout == rollout
        ):
            return replace(history, promotion=None)
        case _:
            return history if run is None else replace(history, run=_apply_to_run(run, event, time=time))


def read_histories(ledger: Ledger) -> dict[str, History]:
    """Return the histories after the ledger's last event, by model.

    Raises:
        ReleaseTooOld: a newer release wrote an event that changes what is served.
    """
    return _read(ledger, sa.true())


def read_running(ledger: Ledger) -> dict[str, History]:
    """Return the histories that the controller follows: a policy, a promotion, or a version that must end later.

    Raises as `read_histories` does.
    """
    return _read(ledger, HISTORIES.c.is_followed)


def read_history(ledger: Ledger, model: str) -> History:
    """Return the history of one model. Raises as `read_histories` does."""
    return _read(ledger, HISTORIES.c.model == model).get(model, History())


def _read(ledger: Ledger, where: sa.ColumnElement[bool]) -> dict[str, History]:
    projection = Projection(
        ledger, name=HISTORIES.name, metadata=METADATA, wanted=is_relevant, apply=_apply_stored
    )
    with projection.reading() as connection:
        rows = connection.execute(sa.select(HISTORIES).where(where).order_by(HISTORIES.c.model))
        return {row.model: _from_json(row.history) for row in rows}


def _in_use(history: History, version: int) -> History:
    """Return the history in which a version does not wait for its end: it is in use again, or removed."""
    return replace(history, warm=tuple(one for one in history.warm if one.version != version))


def _apply_after_end(history: History, event: LedgerEvent, *, time: str) -> History:
    """Apply an event of the time after a rollout."""
    watch = history.watch
    match event:
        case WatchStarted() if history.ended and history.ended.rollout == event.rollout:
            started = WatchRun(
                run=history.ended,
                predecessor=event.predecessor,
                started_at=time,
                watch_s=event.watch_s,
                holdback=event.holdback,
            )
            return replace(history, watch=started)
        case WatchDecided(rollout=rollout) if watch and watch.run.rollout == rollout:
            last = LastDecision(
                at=time,
                verdict=event.verdict,
                step=0,
                reasons=event.reasons,
                missing=[],
                not_done=event.not_done,
            )
            return replace(history, watch=replace(watch, last=last))
        case WatchEnded(rollout=rollout) if watch and watch.run.rollout == rollout:
            return replace(history, watch=None)
        case VersionKeptWarm(version=version):
            until = dt.datetime.fromisoformat(time) + dt.timedelta(seconds=event.window_s)
            kept = Warm(version=version, rollout=event.rollout, until=until.isoformat())
            return replace(history, warm=(*_in_use(history, version).warm, kept))
    return history


def _runs(history: History, rollout: str) -> bool:
    return history.started is not None and history.started["rollout"] == rollout


def _apply_to_run(run: PolicyRun, event: LedgerEvent, *, time: str) -> PolicyRun:
    match event:
        case RolloutWeightChanged(rollout=run.rollout, weight=weight):
            steps = [*run.steps, {"weight": weight, "at": time}]
            return replace(run, weight=weight, step_started_at=time, steps=steps)
        case PolicyPaused(rollout=run.rollout):
            return replace(run, is_paused=True)
        case PolicyResumed(rollout=run.rollout):
            return replace(run, is_paused=False)
        case PolicyDecided(rollout=run.rollout):
            last = LastDecision(
                at=time,
                verdict=event.verdict,
                step=int(event.evidence["step"]),
                reasons=event.reasons,
                missing=event.missing,
                not_done=event.not_done,
            )
            is_inconclusive = run.is_inconclusive or event.verdict == INCONCLUSIVE
            return replace(run, last=last, decisions=run.decisions + 1, is_inconclusive=is_inconclusive)
        case _:
            return run


def _apply_stored(connection: sa.Connection, entry: Entry) -> None:
    """Apply an event to the stored history of its model."""
    event = entry.event()
    require_known(event, Subject.serving)
    model = str(entry.payload.get("model") or entry.payload["name"])
    stored = connection.execute(
        sa.select(HISTORIES.c.history).where(HISTORIES.c.model == model)
    ).scalar_one_or_none()
    before = _from_json(stored) if stored else History()
    after = apply(before, event, time=entry.time)
    if after == before:
        return
    is_followed = after.run is not None or after.watch is not None or bool(after.warm)
    values = {"is_followed": is_followed, "history": json.dumps(asdict(after))}
    if stored:
        connection.execute(HISTORIES.update().where(HISTORIES.c.model == model).values(values))
    else:
        connection.execute(HISTORIES.insert().values(model=model, **values))


def _from_json(text: str) -> History:
    content: dict[str, Any] = json.loads(text)
    promotion, watch = content["promotion"], content["watch"]
    if watch is not None:
        watch = WatchRun(
            **known_fields(WatchRun, watch)
            | {"run": _run_from_json(watch["run"]), "last": _last_from_json(watch["last"])}
        )
    return History(
        champion=content["champion"],
        previous=content["previous"],
        started=content["started"],
        run=_run_from_json(content["run"]),
        promotion=None if promotion is None else Promotion(**known_fields(Promotion, promotion)),
        ended=_run_from_json(content["ended"]),
        watch=watch,
        warm=tuple(Warm(**known_fields(Warm, one)) for one in content["warm"]),
    )


def _run_from_json(content: dict[str, Any] | None) -> PolicyRun | None:
    if content is None:
        return None
    return PolicyRun(**known_fields(PolicyRun, content) | {"last": _last_from_json(content["last"])})


def _last_from_json(content: dict[str, Any] | None) -> LastDecision | None:
    return None if content is None else LastDecision(**known_fields(LastDecision, content))
