"""A rollout of a shadow: no client gets its answers, the controller ends it, and a replay computes it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import RolloutError
from cluster.ledger import Ledger
from cluster.ledger.events import PolicyEnded, ShadowStarted
from cluster.security.tokens.principal import Principal, principal_from_json
from cluster.statistics.evidence import EventCounts, Evidence
from cluster.statistics.policy import UnitEvent
from serve_apps.edge.haproxy.routes import entry
from serve_apps.rollout.assignment import Arm, assign, bounds
from serve_apps.rollout.config import RolloutConfig
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.history import read_history
from serve_apps.rollout.policies import rollback_change, started_events
from serve_apps.rollout.policy.sections import EventGuardrailSpec, TrafficSpec
from serve_apps.rollout.policy.spec import Mode, RolloutSpec
from serve_apps.rollout.replay import replayed_lines
from serve_apps.rollout.serving_state import read_states
from serve_apps.rollout.shadow_runs import (
    require_no_other_shadow,
    require_no_shadow_run,
    shadow_events,
)
from tests.samples.policies import STARTER, EvidenceDouble, permitted
from tests.samples.rollouts import DEPLOYED

CONFIG = RolloutConfig(
    name="m",
    rollout=RolloutSpec(
        mode=Mode.shadow,
        share=50.0,
        event_guardrails=[EventGuardrailSpec(event=UnitEvent.failure, limit=0.05)],
        traffic=TrafficSpec(units_per_hour=2_000, events={"failure": 0.01}, outcome_delay_s=400),
    ),
)
PRINCIPAL: Principal = principal_from_json(STARTER)
HEALTHY = Evidence(
    step=0,
    window=0,
    step_s=7200,
    total_s=7200,
    watched_units=2_000,
    events={UnitEvent.failure: EventCounts(watched=20)},
)
FAILING = replace(HEALTHY, events={UnitEvent.failure: EventCounts(watched=400)})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a ledger in which version 2 is a shadow with a policy."""
    opened = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    for event in DEPLOYED:
        opened.append(event, actor="ann")
    assert CONFIG.rollout is not None
    _, events = started_events(CONFIG, CONFIG.rollout.plan(), version=2, champion=1, principal=PRINCIPAL)
    for event in (*events, *shadow_events(CONFIG, read_states(opened)["m"], 2)):
        opened.append(event, actor="ann")
    return opened


def test_no_unit_gets_a_shadow(ledger: Ledger) -> None:
    """The edge's entry has the rollout, so records have its units, but no bucket belongs to an arm."""
    state = read_states(ledger)["m"]
    assert state.rollout is not None
    assert state.shadow is not None
    assert (state.shadow.version, state.shadow.share) == (2, 50.0)
    assert str(entry(state)).endswith("|0|10000")
    limits = bounds(state.rollout.weight)
    assert {assign("s", str(unit).encode(), limits) for unit in range(500)} == {Arm.outside}


@pytest.mark.parametrize(
    ("counts", "verdict", "outcome"),
    [(HEALTHY, "passed", "passed"), (FAILING, "roll_back", "rolled_back")],
)
def test_verdict_ends_the_shadow(ledger: Ledger, counts: Evidence, verdict: str, outcome: str) -> None:
    """The champion stays. The copies end in the same transaction. A replay gives the same."""
    Controller(ledger, EvidenceDouble(counts), refusal=permitted).check_once()
    state = read_states(ledger)["m"]
    assert (state.champion_version, state.rollout, state.shadow) == (1, None, None)
    [ended] = [entry.event() for entry in ledger.entries(PolicyEnded)]
    assert isinstance(ended, PolicyEnded)
    assert (ended.outcome, ended.weight) == (outcome, 0.0)
    lines = list(replayed_lines(ledger.entries()))
    assert lines[-2].endswith(f": {verdict}")


def test_abort_ends_the_copies(ledger: Ledger) -> None:
    """Like a verdict."""
    change = rollback_change(
        CONFIG, read_states(ledger)["m"], read_history(ledger, "m"), "aborted by command"
    )
    for event in change.events:
        ledger.append(event, actor="ann")
    state = read_states(ledger)["m"]
    assert (state.rollout, state.shadow) == (None, None)


def test_command_that_a_shadow_does_not_allow_is_refused(ledger: Ledger) -> None:
    """A promotion of a version that no client has seen, and a second shadow."""
    with pytest.raises(RolloutError, match="is one of a shadow, so no client has got its answers"):
        require_no_shadow_run(CONFIG, read_history(ledger, "m"), what="so no client has got its answers.")
    state = read_states(ledger)["m"]
    require_no_other_shadow(CONFIG, state, 2)
    with pytest.raises(RolloutError, match="Version 2 of 'm' is the shadow"):
        require_no_other_shadow(CONFIG, state, 3)


def test_shadow_without_a_policy_starts_no_copies(ledger: Ledger) -> None:
    """A canary's start has no event of a shadow."""
    state = read_states(ledger)["m"]
    assert shadow_events(RolloutConfig(name="m"), state, 2) == []
    assert isinstance(shadow_events(CONFIG, state, 2)[0], ShadowStarted)
