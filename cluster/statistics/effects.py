"""Effects with standard errors: differences of means and ratios, with CUPED, and paired differences.

Each unit gives one value, so the requests of a unit need not be independent of each other. All arguments may be arrays;
then each element is one comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.statistics.mixtures import FloatArray, Numbers
from cluster.statistics.moments import Moments


@dataclass(frozen=True, slots=True)
class Effect:
    """An estimate, its standard error, and the number of units behind it."""

    estimate: FloatArray
    standard_error: FloatArray
    units: FloatArray
    """Number of units of both arms together."""
    smallest_arm: FloatArray
    """Number of units of the smaller arm."""


def difference_of_means(treatment: Moments, control: Moments, *, scale: float = 1.0) -> Effect:
    """Return treatment minus `scale` times control, in the unit of the values.

    Args:
        treatment: Moments of the treatment's units.
        control: Moments of the control arm's units.
        scale: Factor of the control's mean, for a margin in percent.
    """
    parts = [_mean_and_variance(arm) for arm in (treatment, control)]
    return _difference(parts, treatment, control, scale)


def difference_of_ratios(treatment: Moments, control: Moments, *, scale: float = 1.0) -> Effect:
    """Return the treatment's ratio of sums minus `scale` times that of control, for example CPU seconds per request.

    A unit's `value` is its part of the numerator, and its `second` number its part of the denominator. The standard
    error is that of the delta method, because requests of the same unit are not independent.
    """
    parts = [_ratio_and_variance(arm) for arm in (treatment, control)]
    return _difference(parts, treatment, control, scale)


def adjusted_difference(treatment: Moments, control: Moments, *, scale: float = 1.0) -> Effect:
    """Return the difference of means after CUPED: without the part that a covariate explains.

    The covariate (the unit's `second` number) must be known before the rollout started, so that no arm can change it.
    The slope is that of both arms together. Source: Deng, Xu, Kohavi and Walker, "Improving the sensitivity of online
    controlled experiments by utilizing pre-experiment data" (2013), equation 4.
    """
    spread = np.asarray(treatment.second_squares + control.second_squares)
    products = np.asarray(treatment.products + control.products)
    slope = np.divide(products, spread, out=np.zeros(spread.shape), where=spread > 0)
    # The slope's error must not move the estimate, so the covariate is counted from its mean over both arms.
    sums = treatment.units * treatment.second_mean + control.units * control.second_mean
    center = np.asarray(sums / np.maximum(treatment.units + control.units, 1))
    parts = [_adjusted_mean_and_variance(arm, slope, center) for arm in (treatment, control)]
    return _difference(parts, treatment, control, scale)


def paired_difference(differences: Moments) -> Effect:
    """Return the mean of the units' differences. For each unit, both versions scored the same requests."""
    mean, variance = _mean_and_variance(differences)
    units = np.asarray(differences.units, np.float64)
    return Effect(mean, np.sqrt(variance), units, units)


def _difference(
    parts: list[tuple[FloatArray, FloatArray]], treatment: Moments, control: Moments, scale: float
) -> Effect:
    (ours, variance), (theirs, control_variance) = parts
    return Effect(
        np.asarray(ours - scale * theirs),
        np.sqrt(variance + scale**2 * control_variance),
        np.asarray(treatment.units + control.units, np.float64),
        np.minimum(treatment.units, control.units),
    )


def _mean_and_variance(arm: Moments) -> tuple[FloatArray, FloatArray]:
    """Return an arm's mean and the variance of this mean."""
    return np.asarray(arm.mean, np.float64), _variance_of_mean(arm.squares, arm.units)


def _ratio_and_variance(arm: Moments) -> tuple[FloatArray, FloatArray]:
    """Return an arm's ratio and its variance by the delta method. Both are 0 without a denominator."""
    known = np.asarray(arm.second_mean) != 0
    safe = np.where(known, arm.second_mean, 1.0)
    ratio = np.where(known, arm.mean / safe, 0.0)
    squares = arm.squares - 2 * ratio * arm.products + ratio**2 * arm.second_squares
    return ratio, np.where(known, _variance_of_mean(squares / safe**2, arm.units), 0.0)


def _adjusted_mean_and_variance(
    arm: Moments, slope: FloatArray, center: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the mean of value - slope * (second - center), and the variance of this mean."""
    squares = arm.squares - 2 * slope * arm.products + slope**2 * arm.second_squares
    return np.asarray(arm.mean - slope * (arm.second_mean - center)), _variance_of_mean(squares, arm.units)


def _variance_of_mean(squares: Numbers, units: Numbers) -> FloatArray:
    """Return the variance of a mean from the sum of squared deviations. It is 0 with fewer than two units."""
    count = np.asarray(units, np.float64)
    return np.asarray(np.maximum(squares, 0.0) / np.maximum(count * (count - 1), 1.0))
