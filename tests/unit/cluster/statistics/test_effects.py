"""Effects are those of the units' values, however the units are grouped, and their standard errors are true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.statistics.effects import (
    Effect,
    adjusted_difference,
    difference_of_means,
    difference_of_ratios,
    paired_difference,
)
from cluster.statistics.moments import Moments
from tests.samples.rollout_simulations import spread_of_cuped

VALUES = st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), max_size=20)


def fields(moments: Moments) -> list[float]:
    names = ("units", "mean", "squares", "second_mean", "second_squares", "products")
    return [float(getattr(moments, name)) for name in names]


@given(VALUES, VALUES)
def test_merged_moments_are_those_of_all_units(
    one: list[tuple[float, float]], other: list[tuple[float, float]]
) -> None:
    """Also if one side is empty."""
    arrays = [np.array(rows).reshape(-1, 2) for rows in (one, other, one + other)]
    first, second, both = (Moments.of(rows[:, 0], rows[:, 1]) for rows in arrays)
    assert fields(first.merge(second)) == pytest.approx(fields(both), rel=1e-9, abs=1e-6)


def test_difference_of_means_has_the_usual_standard_error() -> None:
    draw = np.random.default_rng(1)
    ours, theirs = draw.normal(3, 2, 500), draw.normal(2, 1, 400)
    effect = difference_of_means(Moments.of(ours), Moments.of(theirs))
    assert effect.estimate == pytest.approx(ours.mean() - theirs.mean())
    assert effect.standard_error == pytest.approx(np.sqrt(ours.var(ddof=1) / 500 + theirs.var(ddof=1) / 400))
    assert (effect.units, effect.smallest_arm) == (900, 400)


def test_deviations_keep_their_precision_beside_a_large_mean() -> None:
    """Sums of squares would lose the deviations."""
    values = np.array([1e9, 1e9 + 1, 1e9 + 2])
    merged = Moments.of(values).merge(Moments.of(values))
    assert merged.squares == pytest.approx(4)


def test_standard_error_of_a_ratio_counts_units_and_not_requests() -> None:
    """Over 2,000 experiments, the spread of the estimate is what the delta method says; per request it is far more."""
    draw = np.random.default_rng(2)
    requests = draw.geometric(0.1, (2, 2_000, 300)).astype(float)
    seconds = requests * draw.lognormal(0, 0.5, requests.shape)
    effect = difference_of_ratios(Moments.of(seconds[0], requests[0]), Moments.of(seconds[1], requests[1]))
    assert effect.estimate.std() == pytest.approx(effect.standard_error.mean(), rel=0.05)
    assert abs(effect.estimate.mean()) < 3 * effect.estimate.std() / np.sqrt(2_000)


def test_ratio_without_a_denominator_is_no_evidence() -> None:
    """A standard error of 0 gives an infinite bound."""
    effect = difference_of_ratios(Moments.of(np.ones(5)), Moments.of(np.ones(5)))
    assert (effect.estimate, effect.standard_error) == (0, 0)


def test_cuped_removes_what_the_covariate_explains() -> None:
    """Three quarters of the variance, and the standard error says so."""
    true, said = spread_of_cuped(np.random.default_rng(3), runs=1_000)
    assert true == pytest.approx(0.25, abs=0.05)
    assert said == pytest.approx(true, rel=0.1)


def test_cuped_corrects_an_arm_whose_covariate_is_greater_by_chance() -> None:
    """The values depend on the covariate alone, so the corrected difference is 0."""
    covariates = [np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 5, 7])]
    effect = adjusted_difference(*(Moments.of(2 * one + 1, one) for one in covariates))
    assert effect.estimate == pytest.approx(0, abs=1e-12)


def test_cuped_without_a_covariate_is_the_plain_difference() -> None:
    arms = [Moments.of(np.array([1.0, 2, 4])), Moments.of(np.array([0.0, 1, 1]))]
    assert adjusted_difference(*arms) == difference_of_means(*arms)


def test_scale_compares_with_a_part_of_control() -> None:
    """1.1 times control is 10 % more: no difference."""
    draw = np.random.default_rng(4)
    control = draw.normal(10, 1, 1_000)
    arms = Moments.of(1.1 * control), Moments.of(control)
    effect = difference_of_means(*arms, scale=1.1)
    assert effect.estimate == pytest.approx(0, abs=1e-9)
    assert effect.standard_error == pytest.approx(1.1 * np.sqrt(2) * control.std(ddof=1) / np.sqrt(1_000))


def test_paired_difference_has_one_arm() -> None:
    values = np.array([0.1, -0.2, 0.3])
    effect: Effect = paired_difference(Moments.of(values))
    assert effect.estimate == pytest.approx(values.mean())
    assert effect.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(3))
    assert effect.units == effect.smallest_arm == 3
