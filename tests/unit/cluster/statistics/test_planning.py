"""A plan divides the errors, gives units that reach the power, and refuses what cannot be done."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.errors import RolloutError
from cluster.statistics.coin import is_harm
from cluster.statistics.no_harm import is_no_harm
from cluster.statistics.plan_report import describe
from cluster.statistics.planning import Baseline, plan
from cluster.statistics.policy import (
    DAY_S,
    EventGuardrail,
    Form,
    Goal,
    GoalKind,
    Margin,
    Metric,
    UnitEvent,
)
from cluster.statistics.power import smallest_effect, smallest_share, units_for_mean, units_for_no_harm
from tests.samples.rollout_simulations import GOAL, POLICY, TRAFFIC, superiority, the_plan

NON_INFERIORITY = Goal(
    metric="quality", kind=GoalKind.non_inferiority, margin=Margin(size=0.05, is_relative=True)
)


def test_windows_share_the_error_of_all_guardrails() -> None:
    """Five guardrails share 5 %, and each divides its part over five steps, seven days and the day after."""
    made = the_plan()
    assert made.num_windows == 13
    assert sum(made.window_error(window) for window in range(13)) * 5 == pytest.approx(0.05)
    with pytest.raises(ValueError, match="windows 0 to 12"):
        made.window_error(13)


def test_last_step_has_the_units_that_the_goal_still_needs() -> None:
    """The goal counts the units of all steps."""
    steps = the_plan().steps
    total = sum(step.units for step in steps)
    assert total == units_for_mean(0.03, deviation=0.35, error=0.05)
    assert [step.units for step in steps[:-1]] == [steps[0].units] * 4
    assert all(step.duration_s >= DAY_S / 2 for step in steps)


def test_fewer_units_need_more_time() -> None:
    """A window of a day then has fewer units, so it finds only greater harm."""
    slow = plan(POLICY, replace(TRAFFIC, units_per_hour=300, outcome_delay_s=3_600))
    units = slow.steps[0].units
    assert slow.steps[0].duration_s == pytest.approx(units / 3 * 3600)
    assert slow.steps[-1].duration_s == pytest.approx(slow.steps[-1].units / 150 * 3600 + 3600)
    assert (
        slow.steps[0].smallest_shares[UnitEvent.failure]
        > the_plan().steps[0].smallest_shares[UnitEvent.failure]
    )
    assert slow.duration_s == sum(step.duration_s for step in slow.steps)


def test_policy_that_cannot_finish_is_refused() -> None:
    """The message names the longest step and what to change."""
    with pytest.raises(RolloutError, match=r"deadline is after 168.0 h.*longest step, 1 %.*277 units"):
        plan(POLICY, replace(TRAFFIC, units_per_hour=100))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"events": {}}, "share of units with 'failure'"),
        ({"metrics": {}}, "mean and deviation of the metric 'quality'"),
        (
            {"metrics": {**TRAFFIC.metrics, "cpu": Baseline(mean=-1, deviation=1)}},
            "'cpu' has the mean -1, so its margin cannot be relative",
        ),
        ({"events": dict.fromkeys(UnitEvent, 0.06)}, "cannot prove its limit: 6.000%"),
    ],
)
def test_missing_or_impossible_baseline_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(RolloutError, match=words):
        plan(POLICY, replace(TRAFFIC, **changed))


def test_goal_beyond_the_expected_improvement_is_refused() -> None:
    goal = replace(GOAL, margin=Margin(size=0.04))
    with pytest.raises(RolloutError, match=r"expected improvement 0\.03 is not beyond the margin 0\.04"):
        plan(replace(POLICY, goals=(goal,)), TRAFFIC)


def test_relative_margin_counts_from_the_baseline() -> None:
    """5 % of 0.8 is 0.04."""
    made = plan(replace(POLICY, goals=(NON_INFERIORITY,)), TRAFFIC)
    absolute = units_for_mean(0.04, deviation=0.35, error=0.05)
    assert sum(step.units for step in made.steps) == absolute


def test_paired_metric_needs_fewer_units_than_two_arms() -> None:
    """With the same deviation, half of the variance is missing."""
    paired = units_for_mean(0.02, deviation=0.35, error=0.05, arms=1)
    assert paired == pytest.approx(units_for_mean(0.02, deviation=0.35, error=0.05) / 2, rel=0.01)
    metrics = (Metric(name="quality", form=Form.paired), POLICY.metrics[1])
    assert plan(replace(POLICY, metrics=metrics), TRAFFIC).goal_tunings["quality"] > 0


def test_planned_units_of_no_harm_reach_the_power() -> None:
    """90 % at one look, by simulation."""
    units = units_for_no_harm(0.01, limit=0.05, error=0.05)
    failing = np.random.default_rng(1).binomial(units, 0.01, 20_000)
    concluded = is_no_harm(failing, units, planned_units=units, limit=0.05, error=0.05)
    assert 0.9 <= concluded.mean() < 0.97


@pytest.mark.parametrize(
    ("units", "share", "error"), [(500, 0.01, 0.005), (5_000, 0.01, 0.001), (200, 0.0, 0.005)]
)
def test_smallest_share_is_found_with_the_power(units: int, share: float, error: float) -> None:
    """90 % at one look, by simulation."""
    smallest = smallest_share(units, share, ratio=1, error=error)
    draw = np.random.default_rng(2)
    ours, theirs = draw.binomial(units, smallest, 20_000), draw.binomial(units, share, 20_000)
    assert is_harm(ours, theirs, ratio=1, error=error).mean() == pytest.approx(0.9, abs=0.015)


def test_too_few_units_find_no_share() -> None:
    assert smallest_share(5, 0.01, ratio=1, error=0.001) == 1


def test_planned_units_of_a_mean_reach_the_power() -> None:
    """With 100 looks, more than 90 % of the runs reach the goal with the planned units."""
    deviation = float(np.sqrt((0.12 * 0.88 + 0.1 * 0.9) / 2))
    units = units_for_mean(0.02, deviation=deviation, error=0.05)
    assert smallest_effect(units, deviation=deviation, error=0.05) == pytest.approx(0.02, abs=1e-5)
    found = superiority(np.random.default_rng(3), runs=1_000, treatment=0.12, control=0.1)
    assert found.units_99 < 2 * units


def test_baseline_and_traffic_refuse_wrong_values() -> None:
    with pytest.raises(ValueError, match="deviation above 0"):
        Baseline(mean=1, deviation=0)
    with pytest.raises(ValueError, match="units_per_hour"):
        replace(TRAFFIC, units_per_hour=0)
    with pytest.raises(ValueError, match="share of units with 'slow'"):
        replace(TRAFFIC, events={UnitEvent.slow: 1.0})


def test_limit_that_is_too_near_is_refused() -> None:
    guardrails = (EventGuardrail(event=UnitEvent.failure, limit=0.01),)
    with pytest.raises(RolloutError, match="clearly above the champion's share"):
        plan(replace(POLICY, event_guardrails=guardrails), TRAFFIC)


def test_plan_in_words_has_steps_harm_errors_and_time() -> None:
    """What an operator reads before a rollout starts."""
    lines = describe(the_plan())
    assert lines[0].startswith("step 1: 1 %, 277 units an arm, 12.0 h; finds harm in 90 % of cases")
    assert "failure from 9." in lines[0]
    assert lines[6].startswith("guardrail cpu (ratio): finds a difference of 0.1")
    assert lines[7] == "goal quality: superiority with a margin of 0"
    assert lines[8] == (
        "errors: 1.00% for each guardrail over 13 windows, 5.0% for each goal, 0.1% for a mismatch"
    )
    assert lines[9] == "all steps: 60.0 h, 108.0 h before the deadline"
