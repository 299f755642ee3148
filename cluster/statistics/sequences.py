"""Asymptotic confidence sequences: bounds of a mean that hold at all looks (arXiv 2103.06476).

A bound is the estimate plus or minus a critical value times the standard error, like that of a z-test, but with a
greater critical value. It is one-sided: the boundary of a half-normal mixture (arXiv 1810.08240, one-sided normal
mixture; the closed form in arXiv 2103.06476 is an upper limit of it). The guarantee is that of the central limit
theorem, so the first looks are left out: each arm needs `MIN_UNITS` units.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import lambertw, log_ndtr

from cluster.statistics.effects import Effect
from cluster.statistics.mixtures import FloatArray

MIN_UNITS = 100
"""Number of units that each arm needs before a bound is finite."""
_NEWTON_STEPS = 12
_LOG_SQRT_TWO_PI = 0.5 * np.log(2 * np.pi)


def tuning(planned_units: float, *, error: float) -> float:
    """Return the variance of the mixture whose bound is tightest at the planned number of units.

    Source: arXiv 2103.06476, appendix, the optimum of Robbins' mixture by the Lambert W function; for a one-sided bound
    with `2 * error`.

    Args:
        planned_units: Number of units of both arms together.
        error: Probability that the bound is ever wrong, below 1/2.
    """
    log_term = lambertw(-((2 * error) ** 2) * np.exp(-1), k=-1).real
    return float((-log_term - 1) / planned_units)


def critical_value(units: ArrayLike, *, error: float, variance: float) -> FloatArray:
    """Return the number of standard errors between the estimate and its one-sided bound.

    Args:
        units: Number of units of both arms together, of any shape, at least 1.
        error: Probability that the bound is ever wrong, below 1/2.
        variance: Variance of the mixture, as `tuning` returns it.
    """
    scaled = np.asarray(units, np.float64) * variance
    target = 0.5 * np.log1p(scaled) - np.log(2 * error)
    # Solve x² / 2 + log Φ(x) = target. The closed form is above the solution, and Newton's method falls to it.
    x = np.sqrt(2 * np.log1p(np.exp(target)))
    for _ in range(_NEWTON_STEPS):
        log_share = log_ndtr(x)
        slope = x + np.exp(-(x**2) / 2 - _LOG_SQRT_TWO_PI - log_share)
        x = x - (x**2 / 2 + log_share - target) / slope
    return np.asarray(x * np.sqrt((scaled + 1) / scaled), np.float64)


def radius(effect: Effect, *, error: float, variance: float) -> FloatArray:
    """Return the distance between the estimate and its one-sided bound, in the unit of the estimate.

    It is infinite if an arm has fewer than `MIN_UNITS` units, or if all values are equal: then nothing is known about
    the variance of later values.

    Args:
        effect: The estimate.
        error: Probability that the bound is ever wrong.
        variance: Variance of the mixture, as `tuning` returns it.
    """
    known = (effect.smallest_arm >= MIN_UNITS) & (effect.standard_error > 0)
    width = effect.standard_error * critical_value(
        np.maximum(effect.units, 1), error=error, variance=variance
    )
    return np.where(known, width, np.inf)


def lower_bound(effect: Effect, *, error: float, variance: float) -> FloatArray:
    """Return the lower bound of the effect. Arguments are those of `radius`."""
    return np.asarray(effect.estimate - radius(effect, error=error, variance=variance))


def upper_bound(effect: Effect, *, error: float, variance: float) -> FloatArray:
    """Return the upper bound of the effect. Arguments are those of `radius`."""
    return np.asarray(effect.estimate + radius(effect, error=error, variance=variance))
