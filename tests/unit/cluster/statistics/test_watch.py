"""The verdict after a promotion, and the errors that the plan reserves for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.statistics.breaker import LastRequests
from cluster.statistics.evidence import EventCounts, Evidence
from cluster.statistics.planning import Baseline, Plan, Traffic, plan
from cluster.statistics.policy import (
    DAY_S,
    REQUEST_EVENTS,
    EventGuardrail,
    Metric,
    MetricGuardrail,
    Policy,
    Signal,
    Step,
    UnitEvent,
)
from cluster.statistics.verdict import Verdict
from cluster.statistics.watch import in_plan, judge_watch, watch_plan, windows_before

POLICY = Policy(
    steps=(Step(weight=10), Step(weight=50)),
    metrics=(Metric(name="accuracy"),),
    event_guardrails=tuple(EventGuardrail(event=event, limit=0.05) for event in REQUEST_EVENTS),
    metric_guardrails=(MetricGuardrail(metric="accuracy"),),
    deadline_s=7 * DAY_S,
    watch_s=1.5 * DAY_S,
    holdback=True,
)
TRAFFIC = Traffic(
    units_per_hour=20_000,
    events=dict.fromkeys(REQUEST_EVENTS, 0.01),
    metrics={"accuracy": Baseline(mean=0.8, deviation=0.4)},
)
COUNTS = Evidence(step=0, window=0, step_s=60, total_s=60)
FAILED = replace(COUNTS, last=LastRequests(requests=20, failures=20, units=3))


def planned(*, holdback: bool = True) -> Plan:
    return plan(replace(POLICY, holdback=holdback), TRAFFIC)


def test_all_guardrails_before_and_after_the_promotion_share_the_error() -> None:
    """A guardrail on events has a share for each window, and one on a metric is tested before and after."""
    the_plan = planned()
    of_event = sum(map(the_plan.window_error, range(the_plan.num_windows)))
    total = len(REQUEST_EVENTS) * of_event + 2 * the_plan.guardrail_error
    assert math.isclose(total, POLICY.errors.guardrails)


@pytest.mark.parametrize(("holdback", "error"), [(True, 0.0125), (False, 0.025)])
def test_all_signals_before_and_after_the_promotion_share_the_error(holdback: bool, error: float) -> None:
    """With a holdback, each signal is tested before and after, on other units."""
    segment = Signal(metric="accuracy", column="region", value="north", share=0.2)
    policy = replace(POLICY, signals=(Signal(metric="accuracy"), segment), holdback=holdback)
    assert plan(policy, TRAFFIC).signal_error == error


@pytest.mark.parametrize("days", [0.0, 0.5, 3.0, 6.99])
def test_windows_after_the_promotion_are_others_than_before(days: float) -> None:
    """No window's share of the error is used twice, whenever the promotion comes before the deadline."""
    the_plan = planned()
    used = windows_before(the_plan, rollout_s=days * DAY_S)
    last_before = len(POLICY.steps) - 1 + math.floor(days)
    watched = watch_plan(the_plan, weight=1.0, used=used)
    numbers = [
        in_plan(the_plan, replace(COUNTS, window=window), used=used).window
        for window in range(math.ceil(POLICY.watch_s / DAY_S))
    ]
    assert numbers[0] > last_before
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < the_plan.num_windows
    assert watched.num_windows >= len(numbers)
    assert [step.weight for step in watched.policy.steps] == [1.0]


def test_late_promotion_uses_the_last_window() -> None:
    """By an operator, long after the deadline. The window never ends."""
    the_plan = planned()
    used = windows_before(the_plan, rollout_s=90 * DAY_S)
    assert watch_plan(the_plan, weight=1.0, used=used).num_windows == 1
    assert in_plan(the_plan, COUNTS, used=used).window == the_plan.num_windows - 1


@pytest.mark.parametrize(
    ("holdback", "counts", "verdict"),
    [
        (True, COUNTS, Verdict.advance),
        (True, FAILED, Verdict.advance),
        (True, replace(FAILED, last=replace(FAILED.last, champion_requests=9)), Verdict.roll_back),
        (True, replace(COUNTS, events={UnitEvent.slow: EventCounts(treatment=40)}), Verdict.roll_back),
        (True, replace(COUNTS, events={UnitEvent.slow: EventCounts(control=40)}), Verdict.advance),
        (True, replace(COUNTS, idle_s=7200), Verdict.hold),
        (False, FAILED, Verdict.roll_back),
        (False, replace(FAILED, last=replace(FAILED.last, units=2)), Verdict.advance),
        (False, replace(FAILED, last=replace(FAILED.last, failures=19)), Verdict.advance),
        (False, replace(COUNTS, events={UnitEvent.slow: EventCounts(treatment=40)}), Verdict.advance),
    ],
)
def test_verdict_after_the_promotion(holdback: bool, counts: Evidence, verdict: Verdict) -> None:
    """With a holdback as before; without one, only a version that answers nothing is rolled back."""
    assert judge_watch(planned(holdback=holdback), counts).verdict is verdict


def test_holdback_needs_a_time() -> None:
    """Otherwise it would never end, or never begin."""
    with pytest.raises(ValueError, match="watch_s must be above 0"):
        replace(POLICY, watch_s=0.0)
