"""How many units a test needs, and the smallest harm that it finds with a given number of units.

The results are for one look at the end. With more looks a test finds at least as much, and usually earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri
from scipy.stats import binom

from cluster.statistics.coin import is_harm
from cluster.statistics.mixtures import FloatArray, log_e_above, log_e_below
from cluster.statistics.sequences import MIN_UNITS, critical_value, tuning

POWER = 0.9
"""Probability with which a plan wants to find what it looks for."""
MAX_UNITS = 10**9
"""A test that needs more units than this is impossible."""
_TAIL = 1e-7
_POINTS = 101
"""Number of values of the control arm over which a power is averaged."""
_HALVINGS = 30


def units_for_no_harm(share: float, *, limit: float, error: float, power: float = POWER) -> int:
    """Return how many units `no_harm` needs, or `MAX_UNITS` if these are not enough.

    Args:
        share: Expected share of failing units. It must be below `limit`.
        limit: Share that must be excluded.
        error: Error of the conclusion.
        power: Probability that it is drawn.
    """

    def suffices(units: int) -> bool:
        most = _greatest(lambda failing: log_e_below(failing, units, limit) >= -np.log(error), 0, units)
        return most >= 0 and binom.cdf(most, units, share) >= power

    return _smallest_count(suffices) if share < limit else MAX_UNITS


def units_for_mean(
    distance: float, *, deviation: float, error: float, arms: int = 2, power: float = POWER
) -> int:
    """Return how many units an arm needs until the bound of a mean excludes a null value.

    Args:
        distance: Distance between the expected effect and the null value, in the unit of the metric.
        deviation: Standard deviation of a unit's value.
        error: Error of the bound.
        arms: 2 for a difference of two arms, 1 for paired differences.
        power: Probability that the null value is excluded.
    """

    def suffices(units: int) -> bool:
        return smallest_effect(units, deviation=deviation, error=error, arms=arms, power=power) <= distance

    return max(_smallest_count(suffices), MIN_UNITS) if distance > 0 else MAX_UNITS


def smallest_effect(
    units: int, *, deviation: float, error: float, arms: int = 2, power: float = POWER
) -> float:
    """Return the smallest distance from the null value that is found with so many units in each arm.

    Arguments are those of `units_for_mean`. The sequence is tuned for this number of units.
    """
    total = arms * units
    multiple = critical_value(total, error=error, variance=tuning(total, error=error)) + ndtri(power)
    return float(multiple) * deviation * math.sqrt(arms / units)


def smallest_share(
    units: int, control_share: float, *, ratio: float, error: float, power: float = POWER
) -> float:
    """Return the smallest share of failing units that the coin test finds, or 1 if it finds none.

    Args:
        units: Number of units of each arm in the window.
        control_share: Share of the control's units that fail.
        ratio: Rate ratio that the policy tolerates.
        error: Error of the window.
        power: Probability that the share is found.
    """
    least, greatest = binom.ppf([_TAIL, 1 - _TAIL], units, control_share)
    control = np.unique(np.linspace(least, greatest, _POINTS).round())
    needed = _failures_that_show_harm(control, units, ratio=ratio, error=error)
    # Each number of failing control units stands for those that are nearer to it than to the next one.
    edges = np.append((control[1:] + control[:-1]) // 2, units)
    weights = np.diff(binom.cdf(edges, units, control_share), prepend=0.0)

    def is_found(share: float) -> bool:
        return bool((weights * binom.sf(needed - 1, units, share)).sum() >= power)

    low, high = control_share, 1.0
    if not is_found(high):
        return 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_found(middle) else (middle, high)
    return high


def smallest_share_above(units: int, *, limit: float, error: float, power: float = POWER) -> float:
    """Return the smallest share of failing units that is proven to be above a limit, or 1 if none is.

    Arguments are those of `smallest_share`.
    """
    needed = units - _greatest(
        lambda good: log_e_above(units - np.asarray(good), units, limit) >= -np.log(error), 0, units
    )
    if needed > units:
        return 1.0
    low, high = limit, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if binom.sf(needed - 1, units, middle) >= power else (middle, high)
    return high


def _failures_that_show_harm(control: FloatArray, units: int, *, ratio: float, error: float) -> FloatArray:
    """Return, for each number of failing control units, the smallest number of failing treatment units that is harm.

    The number is `units + 1` if no number is.
    """
    low, high = control * 0, np.full(control.shape, units + 1.0)
    while np.any(high - low > 1):
        middle = np.floor((low + high) / 2)
        harm = is_harm(middle, control, ratio=ratio, error=error)
        low, high = np.where(harm, low, middle), np.where(harm, middle, high)
    return high


def _greatest(holds: Callable[[ArrayLike], ArrayLike], low: int, high: int) -> int:
    """Return the greatest whole number up to `high` for which a condition holds, or `low - 1`.

    If it holds for a number, it holds for all smaller ones.
    """
    low -= 1
    while high > low:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _smallest_count(suffices: Callable[[int], bool]) -> int:
    """Return the smallest number of units that is enough, or `MAX_UNITS`. More units are never worse."""
    high = 1
    while not suffices(high):
        high *= 2
        if high >= MAX_UNITS:
            return MAX_UNITS
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high
