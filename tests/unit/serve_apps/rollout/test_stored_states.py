"""Tests of the stored serving states and limits: they are the fold of the ledger's events."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cluster.ledger import Ledger
from cluster.ledger.events import (
    AliasMoved,
    DeploymentRemoved,
    EdgeLimitSet,
    LedgerEvent,
    ModelDeployed,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutStarted,
    RolloutWeightChanged,
    ShadowStarted,
    ShadowStopped,
    WatchEnded,
    WatchStarted,
)
from serve_apps.edge.control.own_limits import read_own_limits
from serve_apps.edge.haproxy.request_limits import OwnLimits
from serve_apps.rollout.serving_state import States, apply, read_states

MODELS = st.sampled_from(["a", "b"])
VERSIONS = st.integers(1, 2)
WEIGHTS = st.sampled_from([5.0, 20.0, 50.0])
ROLLOUTS = st.sampled_from(["r", "s"])
EVENTS = st.one_of(
    st.builds(
        ModelDeployed,
        name=MODELS,
        version=VERSIONS,
        variant=st.just("x"),
        app=st.just("app"),
        route_prefix=st.just("/"),
    ),
    st.builds(DeploymentRemoved, name=MODELS, version=VERSIONS, app=st.just("app"), reason=st.just("")),
    st.builds(
        AliasMoved,
        name=MODELS,
        alias=st.sampled_from(["champion", "challenger"]),
        version=VERSIONS,
        previous=st.none(),
        reason=st.just(""),
    ),
    st.builds(
        RolloutStarted,
        model=MODELS,
        rollout=ROLLOUTS,
        salt=st.just("s"),
        treatment_version=VERSIONS,
        treatment_variant=st.just("t"),
        champion_version=VERSIONS,
        weight=WEIGHTS,
    ),
    st.builds(
        WatchStarted,
        model=MODELS,
        rollout=ROLLOUTS,
        version=VERSIONS,
        predecessor=VERSIONS,
        salt=st.just("s"),
        holdback=st.booleans(),
        watch_s=st.just(60.0),
    ),
    st.builds(WatchEnded, model=MODELS, rollout=ROLLOUTS, outcome=st.just("over"), reason=st.just("")),
    st.builds(RolloutWeightChanged, model=MODELS, rollout=ROLLOUTS, weight=WEIGHTS),
    st.builds(RolloutPromoted, model=MODELS, rollout=ROLLOUTS, version=VERSIONS),
    st.builds(RolloutRolledBack, model=MODELS, rollout=ROLLOUTS, reason=st.just("")),
    st.builds(ShadowStarted, model=MODELS, version=VERSIONS, app=st.just("app"), share=WEIGHTS),
    st.builds(ShadowStopped, model=MODELS, version=VERSIONS, reason=st.just("")),
)


def fold(states: States, events: list[LedgerEvent]) -> States:
    for number, event in enumerate(events):
        states = apply(states, event, time=str(number))
    return states


@given(st.lists(EVENTS, max_size=12), st.data())
def test_last_events_applied_twice_change_nothing(events: list[LedgerEvent], data: st.DataObject) -> None:
    """A reader that starts with newer states than its position comes to the same states."""
    start = data.draw(st.integers(0, len(events)))
    states = fold({}, events)
    for number, event in enumerate(events[start:], start=start):
        states = apply(states, event, time=str(number))
    assert states == fold({}, events)


def test_stored_states_are_the_fold_of_all_events(tmp_path: Path) -> None:
    """The order of the models is the same, too. This is tested after every event."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    rollout = RolloutStarted(
        model="b",
        rollout="r",
        salt="s",
        treatment_version=2,
        treatment_variant="t",
        champion_version=1,
        weight=5.0,
    )
    events: list[LedgerEvent] = [
        ModelDeployed(name="b", version=1, variant="x", app="b-v1", route_prefix="/b-v1"),
        AliasMoved(name="b", alias="champion", version=1, previous=None, reason=""),
        ModelDeployed(name="a", version=1, variant="x", app="a-v1", route_prefix="/a-v1"),
        ModelDeployed(name="b", version=2, variant="x", app="b-v2", route_prefix="/b-v2"),
        rollout,
        RolloutWeightChanged(model="b", rollout="r", weight=50.0),
        ShadowStarted(model="a", version=2, app="a-v2", share=10.0),
        RolloutPromoted(model="b", rollout="r", version=2),
        DeploymentRemoved(name="b", version=1, app="b-v1", reason=""),
        ShadowStopped(model="a", version=2, reason=""),
    ]
    expected: States = {}
    for event in events:
        entry = ledger.append(event, actor="user:a")
        expected = apply(expected, event, time=entry.time)
        stored = read_states(ledger)
        assert list(stored.items()) == list(expected.items())


def test_stored_limits_are_the_fold_of_all_events(tmp_path: Path) -> None:
    """A limit is replaced, and removed by one without numbers."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    expected = OwnLimits()
    for name, requests_per_s in (("ann", 5), ("bob", 7), ("ann", 9), ("bob", None)):
        event = EdgeLimitSet(limited="tenant", name=name, requests_per_s=requests_per_s, concurrent=None)
        ledger.append(event, actor="user:a")
        expected = expected.apply(event)
        assert read_own_limits(ledger) == expected
