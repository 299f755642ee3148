"""Policies in files, and the commands that use them."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RolloutError
from cluster.ledger import Ledger
from cluster.ledger.events import DeploymentRemoved, LedgerEvent, RolloutStarted
from cluster.security.tokens.principal import principal_from_json
from cluster.statistics.evidence import Evidence
from cluster.statistics.planning import Plan, Traffic
from serve_apps.rollout import transitions
from serve_apps.rollout.__main__ import main as rollout
from serve_apps.rollout.assignment import UnitKind
from serve_apps.rollout.checks import require_same
from serve_apps.rollout.config import RolloutAction, RolloutConfig
from serve_apps.rollout.history import History, apply, read_history
from serve_apps.rollout.json_form import as_json, from_json
from serve_apps.rollout.policies import (
    count_units,
    evidence_store,
    policy_status,
    rollback_change,
    started_events,
)
from serve_apps.rollout.policy.sections import EventGuardrailSpec, StepSpec, TrafficSpec
from serve_apps.rollout.policy.spec import Mode, RolloutSpec
from serve_apps.rollout.serving_state import read_states
from tests.processes.commands import run_main
from tests.samples.policies import EVENTS, FAILING, SPEC, STARTER
from tests.samples.rollouts import DEPLOYED, ROLLED_BACK, STARTED

CONFIG = RolloutConfig(action=RolloutAction.rollback, name="m")
GUARDRAIL = [EventGuardrailSpec()]
TRAFFIC = TrafficSpec(units_per_hour=1000, events={"failure": 0.01})


def spec(**fields: Any) -> RolloutSpec:
    return RolloutSpec(**{"event_guardrails": GUARDRAIL, "traffic": TRAFFIC} | fields)


@pytest.mark.parametrize(
    ("policy", "weights"),
    [
        (spec(), [1, 5, 10, 25, 50]),
        (spec(steps=[StepSpec(weight=7)]), [7]),
        (spec(mode=Mode.linear), [10, 20, 30, 40, 50]),
        (spec(mode=Mode.linear, increment=20), [20, 40, 50]),
        (spec(mode=Mode.linear, increment=12.5), [12.5, 25, 37.5, 50]),
    ],
)
def test_mode_gives_the_weights(policy: RolloutSpec, weights: list[float]) -> None:
    """The last step of a linear policy is 50 %, because above it the arms have no equal size."""
    assert [step.weight for step in policy.policy().steps] == weights


@pytest.mark.parametrize("name", ["bake_s", "deadline_s", "watch_s", "unit_watch_s"])
def test_time_of_more_than_a_year_is_refused(name: str) -> None:
    """A controller could not compute a date that long ago."""
    with pytest.raises(
        ValueError, match=rf"rollout\.{name} must be at most 31536000 seconds \(a year\), got"
    ):
        spec(**{name: 1e12})
    with pytest.raises(ValueError, match=r"rollout\.steps\.0\.bake_s must be at most"):
        spec(steps=[StepSpec(weight=1, bake_s=1e12)])
    with pytest.raises(ValueError, match=r"rollout\.traffic\.outcome_delay_s must be at most"):
        spec(traffic=TrafficSpec(units_per_hour=1, outcome_delay_s=1e12))


def test_steps_have_the_policys_bake_time_unless_they_have_their_own() -> None:
    """Also 0."""
    steps = [StepSpec(weight=1), StepSpec(weight=2, bake_s=0), StepSpec(weight=3, bake_s=5)]
    assert [step.bake_s for step in spec(steps=steps, bake_s=60).policy().steps] == [60, 0, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rollout=canary", "rollout.mode=ab"), "rollout.goals must not be empty with `mode: ab`"),
        (("rollout=canary", "+rollout.weight=20"), "rollout.weight has a meaning only with `mode: ab`"),
        (
            ("rollout=canary", "rollout.mode=linear", "+rollout.increment=60"),
            "rollout.increment must be above 0",
        ),
        (
            ("rollout=canary", "+rollout.steps=[{weight: 10},{weight: 5}]"),
            "steps must have increasing weights",
        ),
        (("rollout=canary", "+rollout.steps=[{weight: 0.015}]"), "steps of 0.01"),
        (("rollout=canary", "+rollout.steps=[{wight: 10}]"), "wight"),
        (("rollout=canary", "rollout.bake_s=-1"), "step.bake_s must be a finite number"),
        (("rollout=canary", "rollout.bake=1"), "Did you mean 'rollout.bake_s'?"),
        (("rollout=canary", "rollout.slow_ms=0"), "rollout.slow_ms must be a number above 0"),
        (("rollout=canary", "rollout.traffic.units_per_hour=0"), "units_per_hour must be a number above 0"),
        (("rollout=canary", "+rollout.traffic.events.slwo=0.1"), "no event 'slwo'. Did you mean 'slow'?"),
        (("rollout=canary", "rollout.traffic.events.failure=1"), "must be 0 or more and below 1"),
        (("rollout=canary", "rollout.deadline_s=3600"), "its deadline is after 1.0 h"),
        (("rollout=canary", "rollout.event_guardrails=[]"), "event_guardrails must not be empty"),
        (("rollout=canary", "+rollout.metrics=[{name: acuracy}]"), "Did you mean 'accuracy'?"),
        (
            ("rollout=canary", "+rollout.metrics=[{name: accuracy}]"),
            "outcome_delay_s must be above 0 with metrics",
        ),
        (("rollout=canary", "rollout.mode=linear", "+rollout.increment=0.1"), "at most 100 steps, got 500"),
        (
            ("rollout=canary", "+rollout.max_units=277"),
            "The step of 1 % gets about 277 units in 1.4 h, so rollout.max_units must be",
        ),
        (
            ("rollout=canary", "rollout.traffic={units: 1}"),
            "'rollout.traffic' has no such entries. To add one, write",
        ),
        (("rollout=canary", "+rollout.max_units=0"), "max_units must be at least 1, got 0"),
        (("rollout=canary", "+rollout.unit=person"), "rollout.unit"),
        (
            ("rollout=canary", "+rollout.metrics=[{name: brier, form: pared}]"),
            "pared",
        ),
        (("rollout=shadow", "rollout.share=0"), "step.weight must be above 0"),
        (("rollout=canry",), "Did you mean 'canary'?"),
        ((), "Give the name of a policy"),
        (("rollout=canary", "weight=5"), "`weight` means nothing with `action=plan`"),
    ],
)
def test_wrong_policy_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """In one line, with exit code 2, and without a cluster."""
    result = run_main(rollout, "action=plan", "name=m", *words, f"storage.root={tmp_path}")
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert result.stderr.count("\n") == 1


def test_plan_prints_units_and_time_of_each_step(tmp_path: Path) -> None:
    """And the smallest harm that is found. Slow units, such as those whose client gave up, are harm, too."""
    result = run_main(rollout, "action=plan", "name=m", "rollout=canary", f"storage.root={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("step 1: 1 %, 277 units an arm, 1.4 h; finds harm")
    assert "slow from" in result.stdout.splitlines()[0]
    assert len(result.stdout.splitlines()) == 7


def test_plan_of_a_shadow_has_one_step(tmp_path: Path) -> None:
    """Its units are those with a copied request."""
    result = run_main(rollout, "action=plan", "name=m", "rollout=shadow", f"storage.root={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("step 1: copies of 100 % of the requests, ")
    assert "disagreement from" in result.stdout.splitlines()[0]
    assert len(result.stdout.splitlines()) == 3


def test_plan_and_counts_survive_their_json_form() -> None:
    """With all digits, so a replay gives the same verdict."""
    the_plan, traffic = SPEC.plan(), SPEC.expected_traffic()
    assert from_json(Plan, as_json(the_plan)) == the_plan
    assert from_json(Traffic, as_json(traffic)) == traffic
    assert from_json(Evidence, as_json(FAILING)) == FAILING


def ledger_with(path: Path, *events: LedgerEvent) -> Ledger:
    ledger = Ledger(f"sqlite:///{path}/ledger.db")
    for event in events:
        ledger.append(event, actor="ann")
    return ledger


def promoted(path: Path) -> Ledger:
    """Return a ledger in which version 2 was promoted over version 1."""
    ledger = ledger_with(path, *EVENTS)
    run, rollout = read_history(ledger, "m").run, read_states(ledger)["m"].rollout
    assert rollout is not None
    ending = transitions.Ending(model="m", rollout=rollout, run=run, reason="good")
    for event in transitions.promotion(ending, champion=1):
        ledger.append(event, actor="ann")
    return ledger


def test_rollback_finds_the_last_promotion(tmp_path: Path) -> None:
    """It makes the champion before it the champion again. A second rollback finds nothing."""
    ledger = promoted(tmp_path)
    change = rollback_change(CONFIG, read_states(ledger)["m"], read_history(ledger, "m"), "worse")
    assert (change.rollout, change.version, change.champion) == ("r", 2, 1)
    for event in change.events:
        ledger.append(event, actor="ann")
    assert read_states(ledger)["m"].champion_version == 1
    assert read_history(ledger, "m").promotion is None
    with pytest.raises(RolloutError, match="No rollout of 'm' runs"):
        rollback_change(CONFIG, read_states(ledger)["m"], read_history(ledger, "m"), "worse")


@pytest.mark.parametrize(
    ("event", "hours", "message"),
    [
        (None, 25.0, r"was promoted 25\.0 h ago, and the rollback window is 24 h"),
        (DeploymentRemoved(name="m", version=1, app="m-v1", reason=""), 1.0, "is not deployed any more"),
        (replace(DEPLOYED[1], version=1), 1.0, "the champion is version 1 now"),
    ],
)
def test_promotion_that_cannot_be_taken_back_is_refused(
    tmp_path: Path, event: LedgerEvent | None, hours: float, message: str
) -> None:
    """The message says what to do."""
    ledger = promoted(tmp_path)
    if event is not None:
        ledger.append(event, actor="ann")
    history = read_history(ledger, "m")
    assert history.promotion is not None
    now = dt.datetime.fromisoformat(history.promotion.at) + dt.timedelta(hours=hours)
    with pytest.raises(RolloutError, match=message):
        rollback_change(CONFIG, read_states(ledger)["m"], history, "worse", now=now)


def test_rollback_of_another_rollout_ends_nothing(tmp_path: Path) -> None:
    """A late rollback of an ended rollout leaves the running one alone."""
    running = replace(STARTED, rollout="later")
    ledger = ledger_with(tmp_path, *DEPLOYED, STARTED, ROLLED_BACK, running, ROLLED_BACK)
    state, history = read_states(ledger)["m"], read_history(ledger, "m")
    assert state.rollout is not None
    assert state.rollout.id == "later"
    assert history.started is not None


def test_status_says_what_is_missing(tmp_path: Path) -> None:
    """Before the first decision there is no verdict."""
    ledger = ledger_with(tmp_path, *EVENTS)
    store = evidence_store(ledger)
    count_units(store, "r", SPEC)
    policy = policy_status(read_history(ledger, "m"), lambda: store)["policy"]
    assert policy["now"]["verdict"] == "continue"
    assert "units: 0 of 277" in policy["now"]["missing"]
    assert (policy["name"], policy["starter"], policy["step"], policy["last_decision"]) == (
        "short",
        "ann",
        "1 of 3",
        None,
    )


def test_second_start_with_another_policy_is_refused(tmp_path: Path) -> None:
    """The message names the policy that runs."""
    ledger = ledger_with(tmp_path, *EVENTS)
    running = read_states(ledger)["m"].rollout
    assert running is not None
    with pytest.raises(RolloutError, match="runs with the policy short, not with none"):
        require_same(RolloutConfig(name="m", version="2"), running, read_history(ledger, "m"))


def start_by(unit: UnitKind) -> tuple[LedgerEvent, ...]:
    """Return the events of a start whose policy has this unit."""
    config = RolloutConfig(name="m", rollout=replace(SPEC, unit=unit))
    principal = principal_from_json(STARTER)
    return tuple(started_events(config, SPEC.plan(), version=2, champion=1, principal=principal)[1])


def test_rollout_by_subject_says_so_in_its_start_and_state(tmp_path: Path) -> None:
    """A second start with another unit is refused. An older release refuses the event, because it assigns by header."""
    ledger = ledger_with(tmp_path, *DEPLOYED, *start_by(UnitKind.subject))
    running = read_states(ledger)["m"].rollout
    assert running is not None
    assert running.unit == "subject"
    started = next(iter(ledger.entries(RolloutStarted)))
    assert started.payload["unit"] == "subject"
    assert started.event().payload() == started.payload
    assert "unit" not in start_by(UnitKind.header)[0].payload()
    config = RolloutConfig(name="m", version="2", rollout=SPEC)
    with pytest.raises(RolloutError, match=r"runs with rollout\.unit=subject, not with header"):
        require_same(config, running, read_history(ledger, "m"))


@pytest.mark.parametrize("last", [1, len(EVENTS)])
def test_history_is_the_fold_of_the_events(tmp_path: Path, last: int) -> None:
    """The stored history is the same."""
    ledger, expected = ledger_with(tmp_path, *EVENTS[:last]), History()
    for entry in ledger.entries():
        expected = apply(expected, entry.event(), time=entry.time)
    assert read_history(ledger, "m") == expected


def test_new_rollout_forgets_the_policy_of_an_earlier_one(tmp_path: Path) -> None:
    """Also if the earlier one never ended, because an older release started the new one."""
    ledger = ledger_with(tmp_path, *EVENTS, replace(STARTED, rollout="later"))
    assert read_history(ledger, "m").run is None
