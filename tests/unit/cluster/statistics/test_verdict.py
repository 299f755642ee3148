"""Every verdict with its reason. The same counts always give the same verdict."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.statistics.breaker import LastRequests, is_open
from cluster.statistics.evidence import EventCounts, Evidence, MetricCounts
from cluster.statistics.moments import Moments
from cluster.statistics.planning import plan
from cluster.statistics.policy import DAY_S, REQUEST_EVENTS, Action, Policy, UnitEvent
from cluster.statistics.sample_ratio import Split
from cluster.statistics.verdict import Verdict, judge
from tests.samples.rollout_simulations import (
    POLICY,
    TRAFFIC,
    evidence_at,
    look_by_look,
    the_plan,
)
from tests.samples.rollout_traffic import NUM_LOOKS, Version, simulate

BROKEN = LastRequests(requests=20, failures=20, units=3, champion_requests=20, champion_failures=0)
LOST = (Split(expected=0.5, treatment=9_000, control=10_000),)


def arm(mean: float, *, units: int = 20_000, deviation: float = 0.35) -> Moments:
    return Moments(units=units, mean=mean, squares=units * deviation**2)


def cpu_seconds(mean: float) -> Moments:
    """Return units with this mean of CPU seconds and two requests each, on average."""
    return Moments(units=20_000, mean=mean, squares=20_000, second_mean=2, second_squares=20_000)


def quality(treatment: float, control: float, splits: tuple[Split, ...] = ()) -> MetricCounts:
    return MetricCounts(treatment=arm(treatment), control=arm(control), splits=splits)


GOOD = Evidence(
    step=4,
    window=4,
    step_s=DAY_S,
    total_s=5 * DAY_S,
    watched_units=20_000,
    events={event: EventCounts(treatment=200, control=200, watched=200) for event in REQUEST_EVENTS},
    metrics={
        "quality": quality(0.82, 0.8),
        "cpu": MetricCounts(treatment=cpu_seconds(2.2), control=cpu_seconds(2.2)),
    },
)
"""Everything is reached at the last step."""


def verdict_of(evidence: Evidence, policy: Policy = POLICY) -> tuple[Verdict, str, str]:
    """Return the verdict, its reasons, and what is missing."""
    decision = judge(the_plan() if policy is POLICY else plan(policy, TRAFFIC), evidence)
    return decision.verdict, "; ".join(decision.reasons), "; ".join(decision.missing)


def test_better_version_is_promoted() -> None:
    assert verdict_of(GOOD) == (Verdict.promote, "all goals are reached, and no harm was found", "")


def test_step_without_anything_missing_leads_to_the_next_step() -> None:
    """Goals are needed only for the promotion."""
    first = replace(GOOD, step=0, window=0, metrics={})
    assert verdict_of(first) == (Verdict.advance, "", "")


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({"step_s": DAY_S / 4}, "bake: 360 min"),
        ({"watched_units": 3_000}, "units: 3000 of "),
        ({"metrics": {}}, "goal: superiority of quality, improvement 0 ± 0 with 0 units"),
        (
            {"metrics": {"quality": quality(0.801, 0.8)}},
            "goal: superiority of quality, improvement 0.001 ± 0.0035 with 40000 units",
        ),
        (
            {"events": {UnitEvent.failure: EventCounts(treatment=980, control=980, watched=980)}},
            "no_harm: failure at most 5.430%, limit 5.000%",
        ),
    ],
)
def test_missing_evidence_is_named_and_never_promotes(changed: dict[str, object], missing: str) -> None:
    verdict, _, named = verdict_of(replace(GOOD, **changed))
    assert verdict is Verdict.advance
    assert missing in named


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"last": BROKEN}, "breaker: the last 20 requests, of 3 units, failed"),
        (
            {"events": {UnitEvent.slow: EventCounts(treatment=300, control=200)}},
            "slow: 300 units of the treatment and 200 of control in window 5, more than 1 times the rate",
        ),
        (
            {"metrics": {"quality": quality(0.78, 0.8)}},
            "quality: worse by more than the margin, improvement -0.02",
        ),
        (
            {"metrics": {"cpu": MetricCounts(treatment=cpu_seconds(2.6), control=cpu_seconds(2))}},
            "cpu: worse by more than the margin, improvement -0.3",
        ),
    ],
)
def test_harm_rolls_back_whatever_else_is_known(changed: dict[str, object], reason: str) -> None:
    """Also with a mismatch and a signal, and although the deadline is over."""
    evidence = replace(GOOD, **changed, signals=("segment",), total_s=30 * DAY_S)
    metrics = {name: replace(counts, splits=LOST) for name, counts in evidence.metrics.items()}
    verdict, reasons, _ = verdict_of(replace(evidence, metrics=metrics))
    assert verdict is Verdict.roll_back
    assert reason in reasons


MISMATCH = replace(GOOD, metrics={**GOOD.metrics, "quality": quality(0.82, 0.8, LOST)})
SIGNAL = replace(GOOD, signals=("drift of age",))
IDLE = replace(GOOD, idle_s=7200)


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (MISMATCH, "mismatch: 9000 and 10000 units entered quality, which is not the split"),
        (SIGNAL, "signal: drift of age"),
        (IDLE, "no data: an arm had no request for 120 min"),
    ],
)
def test_what_blocks_holds_the_promotion(evidence: Evidence, reason: str) -> None:
    """And each step. After the deadline the rollout is inconclusive."""
    assert verdict_of(evidence)[:2] == (Verdict.hold, reason)
    assert verdict_of(replace(evidence, step=0, window=0))[:2] == (Verdict.hold, reason)
    late, reasons, _ = verdict_of(replace(evidence, total_s=8 * DAY_S))
    assert late is Verdict.inconclusive
    assert reason in reasons


def test_policy_chooses_what_a_mismatch_does() -> None:
    """No mismatch is promoted. `warn` lets earlier steps go on."""
    warn = replace(POLICY, on_mismatch=Action.warn)
    verdict, reasons, missing = verdict_of(MISMATCH, warn)
    assert verdict is Verdict.advance
    assert reasons == missing != ""
    assert verdict_of(replace(MISMATCH, step=0, window=0), warn)[::2] == (Verdict.advance, "")
    back = replace(POLICY, on_mismatch=Action.roll_back)
    assert verdict_of(MISMATCH, back)[0] is Verdict.roll_back


@pytest.mark.parametrize(
    ("action", "verdict"),
    [
        (Action.hold, Verdict.inconclusive),
        (Action.roll_back, Verdict.roll_back),
        (Action.warn, Verdict.advance),
    ],
)
def test_deadline_never_promotes_what_is_not_proven(action: Action, verdict: Verdict) -> None:
    """The arms are equal, so superiority is not proven; also if no unit came at all."""
    policy = replace(POLICY, on_deadline=action)
    equal = replace(GOOD, metrics={"quality": quality(0.8, 0.8)}, total_s=8 * DAY_S)
    empty = Evidence(step=0, window=0, step_s=8 * DAY_S, total_s=8 * DAY_S)
    for evidence in (equal, empty):
        given, reasons, missing = verdict_of(evidence, policy)
        assert given is verdict
        assert "deadline" in reasons
        assert missing


def test_proof_at_the_deadline_is_still_promoted() -> None:
    assert verdict_of(replace(GOOD, total_s=8 * DAY_S))[0] is Verdict.promote


def test_window_outside_the_plan_is_an_error() -> None:
    """It has no share of the error, so its guardrails would be blind."""
    with pytest.raises(ValueError, match="windows 0 to 12"):
        judge(the_plan(), replace(GOOD, window=13))


@pytest.mark.parametrize(
    "changed",
    [
        {"requests": 19, "failures": 19},
        {"failures": 19},
        {"units": 2},
        {"champion_requests": 4},
        {"champion_requests": 20, "champion_failures": 5},
    ],
)
def test_breaker_needs_all_conditions(changed: dict[str, int]) -> None:
    """20 failures in a row, of 3 units, beside a healthy champion."""
    assert is_open(BROKEN)
    assert not is_open(replace(BROKEN, **changed))


@pytest.mark.parametrize("seed", range(3))
def test_judge_agrees_with_the_vectorised_simulations(seed: int) -> None:
    """The simulations measure what `judge` does: same look, same verdict, for harm and for a better version."""
    draw = np.random.default_rng(seed)
    rates = {UnitEvent.failure: 0.006, UnitEvent.refusal: 0.01, UnitEvent.slow: 0.02}
    for treatment in (Version(rates=rates), Version(quality=0.85), Version(quality=0.75), Version(cpu=1.5)):
        look = simulate(draw, treatment, Version())
        goal, harm = look_by_look(look)
        verdicts = [judge(the_plan(), evidence_at(look, number)).verdict for number in range(NUM_LOOKS)]
        assert [verdict is Verdict.roll_back for verdict in verdicts] == harm.tolist()
        promoted = np.array([verdict is Verdict.promote for verdict in verdicts])
        assert not np.any(promoted & ~goal)
        assert promoted.any() == (treatment.quality > 0.8 and not harm[-1])


def test_version_whose_guardrails_could_not_judge_is_not_promoted() -> None:
    """Before, a policy without goals promoted a broken version before the first outcome."""
    few = MetricCounts(treatment=arm(0.8, units=99), control=arm(0.8, units=20_000))
    early = replace(GOOD, metrics={**GOOD.metrics, "quality": few})
    without_goals = replace(POLICY, goals=())
    verdict, _, missing = verdict_of(early, without_goals)
    assert (verdict, missing) == (Verdict.advance, "metric: 99 of 100 units an arm entered quality")
    assert verdict_of(GOOD, without_goals)[0] is Verdict.promote
