"""Sample-ratio mismatch: do the units that enter a metric divide over the arms as the split says?

The hash balances the units by itself. A mismatch shows that predictions or outcomes of one arm are lost, so a
comparison of the arms would be biased. The expected share of the treatment may differ between steps. One deviation is
tested over all of them: it multiplies the odds of the treatment by the same factor in each step.

With a deviation `d`, a step's share has the odds `share / (1 - share) * exp(d)`. The mixture over `d` is such that a
share of 1/2 becomes Beta(K/2, K/2). If every step expects 1/2, the e-value is that of the Dirichlet mixture of
arXiv 2011.03567 (test of multinomial hypotheses, two arms, concentration K), which has a closed form. Otherwise the
integral over `d` is computed by the trapezoidal rule around its maximum. The integrand is smooth and almost Gaussian
there, so the relative error is below 1e-9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaln, expit, log_expit, logit, logsumexp

from cluster.statistics.mixtures import FloatArray

CONCENTRATION = 500.0
"""K. A mismatch of about 2 points, such as 48 to 52, is found fastest."""
_NODES = np.linspace(-9, 9, 37)
"""Points of the trapezoidal rule, in standard deviations around the maximum."""
_NEWTON_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The units of one step that entered a metric."""

    expected: float
    """Expected share of the treatment, between 0 and 1. It is 1/2 for arms of equal size."""
    treatment: int
    control: int


def log_evidence_of_mismatch(
    treatment: ArrayLike, control: ArrayLike, expected: ArrayLike = 0.5
) -> FloatArray:
    """Return the logarithm of the e-value against "the treatment has its expected share in every step".

    Args:
        treatment: Number of the treatment's units in each step; the last axis is the step.
        control: Number of the control arm's units in each step, of the same shape.
        expected: Expected share of the treatment in each step.

    Returns:
        Array without the last axis.
    """
    ours, theirs, share = np.broadcast_arrays(
        *(np.atleast_1d(np.asarray(argument, np.float64)) for argument in (treatment, control, expected))
    )
    if np.all(share == 0.5):
        ones, others = ours.sum(-1), theirs.sum(-1)
        half = CONCENTRATION / 2
        return np.asarray(
            betaln(half + ones, half + others) - betaln(half, half) + (ones + others) * np.log(2)
        )
    return _integral(ours, theirs, logit(share))


def is_mismatch(splits: Sequence[Split], *, error: float) -> bool:
    """Return whether the units of these steps are proven to divide otherwise than expected.

    Args:
        splits: The units of each step. Without steps there is no mismatch.
        error: Probability of a false result over all looks and steps.
    """
    if not splits:
        return False
    columns = ([getattr(split, name) for split in splits] for name in ("treatment", "control", "expected"))
    return bool(log_evidence_of_mismatch(*columns) >= -np.log(error))


def _integral(treatment: FloatArray, control: FloatArray, log_odds: FloatArray) -> FloatArray:
    """Return the logarithm of the mixture's likelihood ratio. The last axis of the arguments is the step."""
    half = CONCENTRATION / 2
    units = treatment + control
    maximum = np.zeros(units.shape[:-1])
    for _ in range(_NEWTON_STEPS):
        share, prior = expit(log_odds + maximum[..., None]), expit(maximum)
        slope = (treatment - units * share).sum(-1) + half - CONCENTRATION * prior
        curvature = (units * share * (1 - share)).sum(-1) + CONCENTRATION * prior * (1 - prior)
        maximum = maximum + np.clip(slope / curvature, -1, 1)
    deviation = maximum[..., None] + _NODES / np.sqrt(curvature)[..., None]
    steps = log_odds[..., None] + deviation[..., None, :]
    ratio = treatment[..., None] * (log_expit(steps) - log_expit(log_odds)[..., None])
    ratio += control[..., None] * (log_expit(-steps) - log_expit(-log_odds)[..., None])
    prior = half * (log_expit(deviation) + log_expit(-deviation)) - betaln(half, half)
    width = (_NODES[1] - _NODES[0]) / np.sqrt(curvature)
    return np.asarray(logsumexp(ratio.sum(-2) + prior, axis=-1) + np.log(width))
