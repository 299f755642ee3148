"""E-values for a share: a uniform mixture of alternatives against a limit. `coin` and `no_harm` use them.

A stream of zeros and ones has `k` ones among `n`. Under a null share `p0`, the likelihood ratio of another share `p` is
a martingale that starts at 1. So is its average over a fixed distribution of `p`. If each next value is one with a
conditional probability of at most `p0`, and the average is over `p > p0`, it is a supermartingale. By Ville's
inequality it ever reaches `1 / error` with a probability of at most `error` (arXiv 2011.03567, multinomial hypotheses;
arXiv 1810.08240, beta-binomial mixture). The average over a uniform distribution has a closed form, so the test is
exact from the first value on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincc, betaln, xlog1py, xlogy

FloatArray = NDArray[np.float64]
Numbers = float | FloatArray

_HALVINGS = 60
"""Number of bisections of an interval of width 1, so a bound is exact to 1e-17."""


def log_e_above(ones: ArrayLike, total: ArrayLike, limit: ArrayLike) -> FloatArray:
    """Return the logarithm of the e-value against "the share is at most `limit`".

    The alternatives are uniform over (limit, 1). Far below the limit, the value can underflow to -inf.

    Args:
        ones: Number of ones, of any shape.
        total: Number of values.
        limit: Share, between 0 and 1.

    Returns:
        Array of the common shape of the arguments.
    """
    k, n, p0 = (np.asarray(argument, np.float64) for argument in (ones, total, limit))
    with np.errstate(divide="ignore"):
        average = betaln(k + 1, n - k + 1) + np.log(betaincc(k + 1, n - k + 1, p0)) - np.log1p(-p0)
    return np.asarray(average - xlogy(k, p0) - xlog1py(n - k, -p0), np.float64)


def log_e_below(ones: ArrayLike, total: ArrayLike, limit: ArrayLike) -> FloatArray:
    """Return the logarithm of the e-value against "the share is at least `limit`".

    The alternatives are uniform over (0, limit). Arguments and result are those of `log_e_above`.
    """
    k, n, p0 = (np.asarray(argument, np.float64) for argument in (ones, total, limit))
    return log_e_above(n - k, n, 1 - p0)


def upper_bound(ones: ArrayLike, total: ArrayLike, *, error: float) -> FloatArray:
    """Return the anytime-valid upper bound of a share: the smallest limit that the counts lie below.

    With a probability of at least `1 - error`, the bound is above the true share at all times. It is 1 if all values
    are ones, or if there are none.

    Args:
        ones: Number of ones, of any shape.
        total: Number of values.
        error: Probability that the bound is ever too low.
    """
    k, n = np.broadcast_arrays(np.asarray(ones, np.float64), np.asarray(total, np.float64))
    low = np.divide(k, n, out=np.ones(k.shape), where=n > 0)
    high = np.ones(k.shape)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        with np.errstate(invalid="ignore"):
            proven = log_e_below(k, n, middle) >= -np.log(error)
        high = np.where(proven, middle, high)
        low = np.where(proven, low, middle)
    return high
