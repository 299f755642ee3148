"""`no_harm`: the share of the treatment's units that fail is below an absolute limit.

Two healthy arms have few failing units, so the coin test says nothing about them. A rollout goes on only if this test
concludes: the planned number of units was seen, and the anytime-valid upper bound of the share is below the limit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cluster.statistics.mixtures import FloatArray, log_e_above, log_e_below, upper_bound


def bound_of_failing_share(failing: ArrayLike, units: ArrayLike, *, error: float) -> FloatArray:
    """Return the upper bound of the share of failing units. It is 1 without units.

    Args:
        failing: Number of the treatment's units in this window that failed, of any shape.
        units: Number of all its units in this window. A unit counts only after it was watched for the planned time:
            a unit that has just come had no time to fail.
        error: Probability that the bound is ever below the true share.
    """
    return upper_bound(failing, units, error=error)


def is_no_harm(
    failing: ArrayLike, units: ArrayLike, *, planned_units: ArrayLike, limit: float, error: float
) -> np.ndarray:
    """Return whether enough units were seen, and the upper bound of their failing share is below the limit.

    It gives the same result as `bound_of_failing_share`, without a search.

    Args:
        failing: Number of failing units, as for `bound_of_failing_share`.
        units: Number of all units.
        planned_units: Number of units that the plan requires.
        limit: Share between 0 and 1.
        error: Probability of a false result in this window, over all looks.
    """
    proven = log_e_below(failing, units, limit) >= -np.log(error)
    return np.asarray(proven & (np.asarray(units) >= np.asarray(planned_units)))


def is_above_limit(failing: ArrayLike, units: ArrayLike, *, limit: float, error: float) -> np.ndarray:
    """Return whether the share of failing units is proven to be above the limit.

    A shadow has no control arm: a copy is sent only for a request that the champion has answered. So its events are
    compared with the limit alone. The test is exact from the first unit on (`mixtures.log_e_above`).

    Args:
        failing: Number of failing units, of any shape.
        units: Number of all units. Each is counted once, failing or not.
        limit: Share between 0 and 1.
        error: Probability of a false result over all looks.
    """
    return np.asarray(log_e_above(failing, units, limit) >= -np.log(error))
