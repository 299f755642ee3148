"""The coin test: does the treatment have more failing, refusing or slow units than the policy tolerates?

In each window (a step of the rollout, or a day) a unit counts once, with its first failure. Both arms have the same
number of buckets, and a hash assigns the units. So if both versions are equally healthy, the arm of the next such unit
is a fair coin. It stays fair if the failure rate changes over time, and if a unit sends many requests. If the
treatment's rate is at most `ratio` times that of control, the coin shows treatment with a probability of at most
`ratio / (1 + ratio)`.

The test is exact and one-sided, and needs no minimum of units (arXiv 2011.03567). It holds only for arms of equal size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cluster.statistics.mixtures import FloatArray, log_e_above


def fair_share(ratio: ArrayLike) -> FloatArray:
    """Return the treatment's share of the failing units if its rate is `ratio` times that of control."""
    rates = np.asarray(ratio, np.float64)
    return np.asarray(rates / (1 + rates), np.float64)


def log_evidence_of_harm(treatment: ArrayLike, control: ArrayLike, *, ratio: float) -> FloatArray:
    """Return the logarithm of the e-value against "the treatment's rate is at most `ratio` times that of control".

    It reaches `-log(error)` with a probability of at most `error` if the treatment does no harm.

    Args:
        treatment: Number of units of the treatment whose first failure was in this window, of any shape.
        control: The same number of the control arm.
        ratio: Rate ratio that the policy tolerates, at least 1.
    """
    failing = np.asarray(treatment, np.float64)
    return log_e_above(failing, failing + np.asarray(control, np.float64), fair_share(ratio))


def is_harm(treatment: ArrayLike, control: ArrayLike, *, ratio: float, error: float) -> np.ndarray:
    """Return whether the treatment's rate is proven to be more than `ratio` times that of control.

    Args:
        treatment: Number of failing units of the treatment, as for `log_evidence_of_harm`.
        control: Number of failing units of control.
        ratio: Rate ratio that the policy tolerates.
        error: Probability of a false result in this window, over all looks.
    """
    return np.asarray(log_evidence_of_harm(treatment, control, ratio=ratio) >= -np.log(error))
