"""Error rates and power by simulation, with fewer runs than `make bench BENCH=rollout_statistics`.

The seeds are fixed, so a test gives the same result each time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.statistics.policy import REQUEST_EVENTS, Form, UnitEvent
from tests.samples.rollout_simulations import (
    failing_share,
    false_no_harm,
    false_signal,
    goal_by_form,
    late_harm,
    mismatch,
    requests_until_break,
    rollouts,
    share_above_limit,
    superiority,
)
from tests.samples.rollout_traffic import Version

RUNS = 300
HEALTHY = Version()


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(17)


def test_equal_versions_are_rarely_promoted_or_rolled_back(draw: np.random.Generator) -> None:
    """With repeat units, drifting rates and late outcomes. A z-test at each look would be wrong six times as often."""
    rates = rollouts(draw, HEALTHY, HEALTHY, runs=RUNS)
    assert rates.goal <= 0.05
    assert rates.rollback <= 0.05
    assert rates.z_test > 0.2


def test_better_version_is_not_rolled_back(draw: np.random.Generator) -> None:
    """Half of the failures, faster, cheaper, and with better predictions. It reaches its goal."""
    better = Version(rates={event: rate / 2 for event, rate in HEALTHY.rates.items()}, quality=0.84, cpu=0.8)
    rates = rollouts(draw, better, HEALTHY, runs=60)
    assert rates.rollback == 0
    assert rates.goal == 1


@pytest.mark.parametrize("event", REQUEST_EVENTS)
def test_each_kind_of_harm_is_rolled_back(draw: np.random.Generator, event: UnitEvent) -> None:
    """Three times the rate of one event."""
    worse = replace(HEALTHY, rates={**HEALTHY.rates, event: 3 * HEALTHY.rates[event]})
    assert rollouts(draw, worse, HEALTHY, runs=20).rollback == 1


@pytest.mark.parametrize("worse", [Version(quality=0.75), Version(cpu=1.4)])
def test_worse_predictions_and_greater_cost_are_rolled_back(
    draw: np.random.Generator, worse: Version
) -> None:
    """Five points of quality, or 40 % more CPU time where 10 % is tolerated."""
    assert rollouts(draw, worse, HEALTHY, runs=20).rollback == 1


def test_two_points_more_are_found_within_20000_units(draw: np.random.Generator) -> None:
    found = superiority(draw, runs=RUNS, treatment=0.12, control=0.1)
    assert found.found >= 0.95
    assert found.mean_units < 6_000
    assert superiority(draw, runs=RUNS, treatment=0.1, control=0.1).found <= 0.05


@pytest.mark.parametrize("form", Form)
def test_each_form_of_a_metric_is_rarely_better_by_chance(draw: np.random.Generator, form: Form) -> None:
    """Means, ratios by the delta method, CUPED and paired differences: 2,000 runs, 100 looks."""
    assert goal_by_form(draw, form=form, runs=2_000).found <= 0.05


def test_signals_rarely_hold_a_harmless_version(draw: np.random.Generator) -> None:
    """Four segments share the error: 2,000 runs, 100 looks."""
    assert false_signal(draw, runs=2_000) <= 0.05


def test_shadow_at_its_limit_is_rarely_stopped_and_a_worse_one_is(draw: np.random.Generator) -> None:
    """One of four guardrails has a quarter of 5 %: 2,000 runs, 100 looks."""
    assert share_above_limit(draw, runs=2_000, share=0.05, limit=0.05).found <= 0.0125
    worse = share_above_limit(draw, runs=2_000, share=0.1, limit=0.05)
    assert worse.found == 1
    assert worse.mean_units < 500


def test_cuped_needs_fewer_units(draw: np.random.Generator) -> None:
    """The covariate explains eight ninths of the variance, so less than a third of the units are enough."""
    plain, adjusted = (
        goal_by_form(draw, form=form, runs=100, effect=0.15) for form in (Form.mean, Form.adjusted)
    )
    assert adjusted.found == 1
    assert adjusted.mean_units < plain.mean_units / 3


def test_late_harm_is_found_only_with_windows(draw: np.random.Generator) -> None:
    """After 200 requests most units have failed once, so without windows they could not show the harm."""
    assert late_harm(draw, runs=RUNS) >= 0.99
    assert late_harm(draw, runs=RUNS, with_windows=False) < 0.1


@pytest.mark.parametrize("ramping", [False, True])
def test_mismatch_is_found_and_rarely_invented(draw: np.random.Generator, ramping: bool) -> None:
    """48 to 52 within 30,000 units.

    If the expected share changes from 20 % to 50 %, fewer runs find it, because uneven arms tell less.
    """
    assert mismatch(draw, runs=RUNS, share=0.5, ramping=ramping).found <= 1 / RUNS
    assert mismatch(draw, runs=RUNS, share=0.48, ramping=ramping).found >= (0.97 if ramping else 0.99)


def test_version_that_always_fails_is_out_within_25_units(draw: np.random.Generator) -> None:
    found = failing_share(draw, runs=RUNS, treatment=1, control=0.01, units=100)
    assert found.units_99 <= 25


def test_breaker_needs_at_most_25_requests(draw: np.random.Generator) -> None:
    """In 99 % of runs."""
    assert np.quantile(requests_until_break(draw, runs=RUNS), 0.99) <= 25


def test_five_times_the_failures_are_found_within_500_units(draw: np.random.Generator) -> None:
    """5 % against 1 %, on average over the runs."""
    found = failing_share(draw, runs=RUNS, treatment=0.05, control=0.01)
    assert found.found == 1
    assert found.mean_units <= 500


@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_tolerated_rate_is_rarely_rolled_back(draw: np.random.Generator, ratio: float) -> None:
    """At the ratio itself, where an error is most likely; at most one run in 300 has the error of the first window."""
    found = failing_share(draw, runs=RUNS, treatment=0.1 * ratio, control=0.1, ratio=ratio)
    assert found.found <= 2 / RUNS


def test_share_at_the_limit_is_rarely_called_harmless(draw: np.random.Generator) -> None:
    assert false_no_harm(draw, runs=RUNS, share=0.02, limit=0.02) <= 0.05
    assert false_no_harm(draw, runs=RUNS, share=0.01, limit=0.02) > 0.99
