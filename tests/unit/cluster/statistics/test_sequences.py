"""Confidence sequences agree with another package, are tuned best, and are infinite where nothing is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.statistics.effects import Effect, difference_of_means
from cluster.statistics.moments import Moments
from cluster.statistics.sequences import MIN_UNITS, critical_value, lower_bound, radius, tuning, upper_bound

BOUNDARIES = json.loads(Path(__file__).with_name("reference.json").read_text())["boundaries"]


def effect(estimate: float, standard_error: float, units: int) -> Effect:
    return Effect(*(np.asarray(number) for number in (estimate, standard_error, 2 * units, units)))


@pytest.mark.parametrize("row", BOUNDARIES, ids=str)
def test_critical_value_is_the_boundary_of_another_package(row: dict[str, float]) -> None:
    """ville's one-sided normal mixture, for a sum of values of variance 1. `make_reference.py` wrote it."""
    ours = critical_value(row["units"], error=row["error"], variance=row["variance"])
    assert ours == pytest.approx(row["boundary"] / np.sqrt(row["units"]), rel=1e-9)


@pytest.mark.parametrize("error", [0.05, 0.01, 0.001])
def test_closed_form_of_the_paper_is_just_above(error: float) -> None:
    """arXiv 2103.06476 gives an upper limit of the exact boundary, which differs by at most 2 %."""
    units, variance = np.array([100, 1_000, 10_000, 1e6]), tuning(10_000, error=error)
    scaled = units * variance
    closed = np.sqrt(2 * (scaled + 1) / scaled * np.log1p(np.sqrt(scaled + 1) / (2 * error)))
    exact = critical_value(units, error=error, variance=variance)
    assert np.all(exact < closed)
    assert np.all(closed < 1.02 * exact)


@pytest.mark.parametrize("error", [0.05, 0.01, 0.001])
def test_tuning_is_best_at_the_planned_units(error: float) -> None:
    """Twice and half the variance give wider bounds there."""
    best = tuning(5_000, error=error)
    widths = [critical_value(5_000, error=error, variance=best * factor) for factor in (0.5, 1, 2)]
    assert widths[1] < min(widths[0], widths[2])


def test_nothing_is_known_with_few_units_or_without_variance() -> None:
    """Equal values say nothing about later ones: 100 units without a rare failure prove nothing."""
    few, equal = effect(1, 0.1, MIN_UNITS - 1), effect(0, 0, 10_000)
    assert radius(few, error=0.05, variance=0.01) == np.inf
    assert radius(equal, error=0.05, variance=0.01) == np.inf
    assert radius(effect(1, 0.1, MIN_UNITS), error=0.05, variance=0.01) < np.inf


def test_bounds_are_on_both_sides_of_the_estimate() -> None:
    one = effect(1, 0.1, 1_000)
    lower, upper = (bound(one, error=0.05, variance=0.001) for bound in (lower_bound, upper_bound))
    assert lower < 1 < upper
    assert upper - 1 == pytest.approx(1 - lower)


def test_empty_arms_have_no_effect_and_no_bound() -> None:
    """So a verdict can be given before the first unit has come."""
    nothing = difference_of_means(Moments(), Moments())
    assert lower_bound(nothing, error=0.05, variance=0.01) == -np.inf
