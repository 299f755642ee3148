"""Serving state of every model, computed from ledger events by a pure function.

`read_states` stores the states in a projection, so that it applies only new events. Applying the last events a second
time, in order, changes nothing. So another reader of the ledger may start with the stored states and an earlier
position.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import (
    AliasMoved,
    DeploymentRemoved,
    LedgerEvent,
    ModelDeployed,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutStarted,
    RolloutWeightChanged,
    ShadowStarted,
    ShadowStopped,
    Subject,
    WatchEnded,
    WatchStarted,
    require_known,
)
from cluster.ledger.projection import Projection
from cluster.registry import CHAMPION
from serve_apps.rollout.assignment import UnitKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A running rollout."""

    id: str
    salt: str
    treatment_version: int
    treatment_variant: str
    weight: float
    """Percentage of the units that the treatment answers."""
    started_at: str = ""
    reached: float = 0.0
    """The greatest weight of this rollout so far."""
    unit: str = UnitKind.header.value
    """What names the unit of a request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """The time after a promotion in which the controller goes on judging the new champion."""

    rollout: str
    salt: str
    version: int
    predecessor: int
    holdback: bool
    """Whether a part of the units keeps the predecessor."""
    unit: str = UnitKind.header.value


@dataclass(frozen=True, kw_only=True, slots=True)
class Shadow:
    """A version that gets copies of requests. Its answers are only logged."""

    version: int
    app: str
    share: float
    """Percentage of the requests that are copied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """Serving state of one model: its champion, deployed versions, rollout, shadow, and the watch of a promotion."""

    champion_version: int | None = None
    apps: dict[int, str] = field(default_factory=dict)
    """From a deployed version to the name of its Serve application."""
    rollout: Rollout | None = None
    shadow: Shadow | None = None
    watch: Watch | None = None
    """None also while a rollout runs."""

    def usage_of(self, version: int) -> str | None:
        """Return in words which requests a version gets now, or None if it gets no requests."""
        if version == self.champion_version:
            return "the champion"
        if self.rollout is not None and version == self.rollout.treatment_version:
            return f"the treatment of rollout {self.rollout.id}"
        if self.shadow is not None and version == self.shadow.version:
            return "the shadow"
        return None


States = dict[str, ModelState]

_WATCH_TYPES = (WatchStarted.__name__, WatchEnded.__name__)

METADATA = sa.MetaData()
STATES = sa.Table(
    "serving_states_3",
    METADATA,
    sa.Column("model", sa.String(128), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
)
"""One row for each model, in the order of the models' first events. A release that computes the states differently must
change the number in the table's name."""


def apply(states: States, event: LedgerEvent, *, time: str = "") -> States:
    """Return the states after one more event. Events that are not about serving change nothing.

    Raises:
        ReleaseTooOld: a newer release wrote the event, and it changes what is served.
    """
    require_known(event, Subject.serving)
    match event:
        case ModelDeployed(name=name, version=version, app=app):
            state = states.get(name, ModelState())
            return states | {name: replace(state, apps=state.apps | {version: app})}
        case DeploymentRemoved(name=name, version=version):
            state = states.get(name, ModelState())
            apps = {number: app for number, app in state.apps.items() if number != version}
            return states | {name: _without_watch_of(replace(state, apps=apps), predecessor=version)}
        case AliasMoved(name=name, alias=alias, version=version) if alias == CHAMPION:
            state = replace(states.get(name, ModelState()), champion_version=version)
            return states | {name: _without_other_watch(state)}
        case RolloutStarted():
            rollout = Rollout(
                id=event.rollout,
                salt=event.salt,
                treatment_version=event.treatment_version,
                treatment_variant=event.treatment_variant,
                weight=event.weight,
                started_at=time,
                reached=event.weight,
                unit=event.unit,
            )
            return _with_watch(_with_rollout(states, event.model, rollout), event.model, None)
        case WatchStarted(model=model):
            watch = Watch(
                rollout=event.rollout,
                salt=event.salt,
                version=event.version,
                predecessor=event.predecessor,
                holdback=event.holdback,
                unit=event.unit,
            )
            return _with_watch(states, model, watch)
        case WatchEnded(model=model, rollout=rollout_id):
            ended = states.get(model, ModelState()).watch
            return _with_watch(states, model, None) if ended and ended.rollout == rollout_id else states
        case RolloutWeightChanged(model=model, rollout=rollout_id, weight=weight):
            current = states.get(model, ModelState()).rollout
            if current is None or current.id != rollout_id:
                return states
            return _with_rollout(
                states, model, replace(current, weight=weight, reached=max(current.reached, weight))
            )
        case (
            RolloutPromoted(model=model, rollout=rollout_id)
            | RolloutRolledBack(model=model, rollout=rollout_id)
        ):
            current = states.get(model, ModelState()).rollout
            if current is None or current.id != rollout_id:
                return states
            return _with_rollout(states, model, None)
        case ShadowStarted(model=model, version=version, app=app, share=share):
            return _with_shadow(states, model, Shadow(version=version, app=app, share=share))
        case ShadowStopped(model=model):
            return _with_shadow(states, model, None)
        case _:
            return states


def changes_serving(type_name: str) -> bool:
    """Return whether events of a type can change a serving state."""
    return type_name in _WATCH_TYPES or Subject.serving.includes(type_name)


def read_states(ledger: Ledger) -> States:
    """Return the states after the ledger's last event.

    Raises:
        ReleaseTooOld: a newer release wrote an event that changes what is served.
    """
    projection = Projection(
        ledger, name=STATES.name, metadata=METADATA, wanted=changes_serving, apply=_apply_stored
    )
    query = sa.select(STATES.c.model, STATES.c.state).order_by(STATES.c.seq)
    with projection.reading() as connection:
        return {row.model: _from_json(row.state) for row in connection.execute(query)}


def _apply_stored(connection: sa.Connection, entry: Entry) -> None:
    """Apply an event to the stored state of its model."""
    event = entry.event()
    require_known(event, Subject.serving)
    payload = event.payload()
    model = str(payload["model"] if "model" in payload else payload["name"])
    stored = connection.execute(sa.select(STATES).where(STATES.c.model == model)).first()
    before = {model: _from_json(stored.state)} if stored else {}
    after = apply(before, event, time=entry.time)
    if after == before:
        return
    text = json.dumps(asdict(after[model]))
    if stored:
        connection.execute(STATES.update().where(STATES.c.model == model).values(state=text))
    else:
        connection.execute(STATES.insert().values(model=model, seq=entry.seq, state=text))


def _from_json(text: str) -> ModelState:
    content: dict[str, Any] = json.loads(text)
    return ModelState(
        champion_version=content["champion_version"],
        apps={int(version): app for version, app in content["apps"].items()},
        rollout=Rollout(**content["rollout"]) if content["rollout"] else None,
        shadow=Shadow(**content["shadow"]) if content["shadow"] else None,
        watch=Watch(**content["watch"]) if content["watch"] else None,
    )


def _with_rollout(states: States, model: str, rollout: Rollout | None) -> States:
    return states | {model: replace(states.get(model, ModelState()), rollout=rollout)}


def _with_watch(states: States, model: str, watch: Watch | None) -> States:
    return states | {model: replace(states.get(model, ModelState()), watch=watch)}


def _without_watch_of(state: ModelState, *, predecessor: int) -> ModelState:
    """End the watch if its predecessor is not deployed any more."""
    watch = state.watch
    return replace(state, watch=None) if watch and watch.predecessor == predecessor else state


def _without_other_watch(state: ModelState) -> ModelState:
    """End the watch if another version is the champion now."""
    watch = state.watch
    return replace(state, watch=None) if watch and watch.version != state.champion_version else state


def _with_shadow(states: States, model: str, shadow: Shadow | None) -> States:
    return states | {model: replace(states.get(model, ModelState()), shadow=shadow)}
