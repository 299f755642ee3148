"""Signals hold and do nothing else; a shadow is judged by its own limits, and never promoted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.statistics.evidence import EventCounts, Evidence, MetricCounts
from cluster.statistics.moments import Moments
from cluster.statistics.no_harm import is_above_limit
from cluster.statistics.plan_report import describe
from cluster.statistics.planning import Baseline, Traffic, plan
from cluster.statistics.policy import (
    DAY_S,
    EventGuardrail,
    Form,
    Goal,
    GoalKind,
    Margin,
    Metric,
    Policy,
    Signal,
    Step,
    UnitEvent,
)
from cluster.statistics.power import smallest_share_above, units_for_no_harm
from cluster.statistics.verdict import Verdict, judge
from tests.samples.rollout_simulations import POLICY, TRAFFIC
from tests.unit.cluster.statistics.test_verdict import GOOD, LOST, quality

SEGMENT = Signal(metric="quality", column="region", value="north", share=0.2)
WITH_SIGNALS = replace(POLICY, signals=(Signal(metric="quality"), SEGMENT))
SHADOW = Policy(
    steps=(Step(weight=100),),
    metrics=(Metric(name="brier", form=Form.paired),),
    goals=(Goal(metric="brier", kind=GoalKind.non_inferiority, margin=Margin(size=0.05)),),
    event_guardrails=(
        EventGuardrail(event=UnitEvent.failure, limit=0.05),
        EventGuardrail(event=UnitEvent.disagreement, limit=0.2),
    ),
    deadline_s=DAY_S,
    is_shadow=True,
)
SHADOW_TRAFFIC = Traffic(
    units_per_hour=2_000,
    events={UnitEvent.failure: 0.01, UnitEvent.disagreement: 0.1},
    metrics={"brier": Baseline(mean=0, deviation=0.2)},
    outcome_delay_s=3600,
)
PASSING = Evidence(
    step=0,
    window=0,
    step_s=7200,
    total_s=7200,
    watched_units=2_000,
    events={
        UnitEvent.failure: EventCounts(watched=20),
        UnitEvent.disagreement: EventCounts(watched=200),
    },
    metrics={"brier": MetricCounts(treatment=Moments(units=2_000, mean=0.001, squares=80.0))},
)


@pytest.mark.parametrize("name", ["quality", "quality[region=north]"])
def test_signal_holds_and_does_nothing_else(name: str) -> None:
    """Also in a segment of units whose metric is fine as a whole. Without units it says nothing."""
    the_plan = plan(WITH_SIGNALS, TRAFFIC)
    assert judge(the_plan, GOOD).verdict is Verdict.promote
    worse = replace(GOOD, step=0, window=0, metrics={**GOOD.metrics, name: quality(0.77, 0.8)})
    decision = judge(replace(the_plan, policy=replace(WITH_SIGNALS, metric_guardrails=())), worse)
    assert decision.verdict is Verdict.hold
    assert decision.reasons[0].startswith(
        f"signal: {name} is worse by more than the margin, improvement -0.03"
    )
    tolerated = replace(WITH_SIGNALS, signals=(replace(SEGMENT, margin=Margin(size=0.1)),))
    of_segment = replace(worse, metrics={"quality[region=north]": quality(0.77, 0.8)})
    assert judge(plan(tolerated, TRAFFIC), of_segment).verdict is Verdict.advance


def test_uneven_segment_is_no_mismatch() -> None:
    """It would add the errors of all segments to that of the metric."""
    uneven = quality(0.82, 0.8, splits=LOST)
    evidence = replace(GOOD, metrics={**GOOD.metrics, SEGMENT.name: uneven})
    assert judge(plan(WITH_SIGNALS, TRAFFIC), evidence).verdict is Verdict.promote


def test_signals_share_an_error_and_a_segment_finds_only_greater_harm() -> None:
    """The plan says so."""
    the_plan = plan(WITH_SIGNALS, TRAFFIC)
    assert the_plan.signal_error == 0.025
    whole, segment = (the_plan.smallest_signals[signal.name] for signal in WITH_SIGNALS.signals)
    assert segment == pytest.approx(whole * 5**0.5, rel=0.01)
    lines = describe(the_plan)
    assert any(line.startswith("signal quality for region=north: holds at a difference of") for line in lines)
    assert any(line.endswith("0.1% for a mismatch, 2.50% for each signal") for line in lines)


def test_shadow_passes_and_is_not_promoted() -> None:
    """When the units were seen, each event is proven to be below its limit, and the goal is reached."""
    the_plan = plan(SHADOW, SHADOW_TRAFFIC)
    assert judge(the_plan, PASSING).verdict is Verdict.passed
    early = replace(PASSING, watched_units=200, events={UnitEvent.failure: EventCounts(watched=2)})
    decision = judge(the_plan, early)
    assert decision.verdict is Verdict.advance
    assert any(text.startswith("units: 200 of") for text in decision.missing)


@pytest.mark.parametrize("event", [UnitEvent.failure, UnitEvent.disagreement])
def test_shadow_above_a_limit_is_stopped(event: UnitEvent) -> None:
    """There is no control arm: a copy exists only for a request that the champion answered."""
    worse = replace(PASSING, events={event: EventCounts(watched=600)})
    decision = judge(plan(SHADOW, SHADOW_TRAFFIC), worse)
    assert decision.verdict is Verdict.roll_back
    assert decision.reasons[0].startswith(f"{event}: 600 of 2000 units of the shadow, limit")


def test_plan_of_a_shadow_says_what_it_finds() -> None:
    """The outcomes of the last units are waited for."""
    the_plan = plan(SHADOW, SHADOW_TRAFFIC)
    [step] = the_plan.steps
    assert step.duration_s == pytest.approx(step.units / 2_000 * 3600 + 3600)
    assert step.units >= units_for_no_harm(0.1, limit=0.2, error=0.05)
    assert describe(the_plan)[0].startswith("step 1: copies of 100 % of the requests, ")
    assert "units an arm" not in describe(the_plan)[0]
    share = step.smallest_shares[UnitEvent.failure]
    assert 0.05 < share < 0.15
    found = smallest_share_above(step.units, limit=0.05, error=the_plan.guardrail_error)
    assert is_above_limit(round(share * step.units * 1.2), step.units, limit=0.05, error=0.025)
    assert share == found


def test_few_units_find_nothing() -> None:
    """Also if all of them fail."""
    assert smallest_share_above(1, limit=0.5, error=0.01) == 1.0
