"""Compare the arms in one metric: is a goal reached, is the treatment proven to be worse?"""

from __future__ import annotations

import numpy as np

from cluster.statistics.effects import (
    Effect,
    adjusted_difference,
    difference_of_means,
    difference_of_ratios,
    paired_difference,
)
from cluster.statistics.evidence import MetricCounts
from cluster.statistics.policy import Better, Form, Goal, GoalKind, Margin, Metric
from cluster.statistics.sequences import lower_bound, upper_bound


def improvement(metric: Metric, counts: MetricCounts, *, tolerated: Margin) -> Effect:
    """Return how much better the treatment is than a control that is worse by the tolerated margin.

    It is above 0 if the treatment is better than control, or worse by less than the margin. It has the unit of the
    metric. With the default margin of 0, it is the treatment's improvement.
    """
    sign = 1.0 if metric.better is Better.high else -1.0
    scale = 1 - sign * tolerated.size if tolerated.is_relative else 1.0
    match metric.form:
        case Form.paired:
            effect = paired_difference(counts.treatment)
        case Form.ratio:
            effect = difference_of_ratios(counts.treatment, counts.control, scale=scale)
        case Form.adjusted:
            effect = adjusted_difference(counts.treatment, counts.control, scale=scale)
        case Form.mean:
            effect = difference_of_means(counts.treatment, counts.control, scale=scale)
    shift = 0.0 if tolerated.is_relative else tolerated.size
    return Effect(
        np.asarray(sign * effect.estimate + shift), effect.standard_error, effect.units, effect.smallest_arm
    )


def is_reached(
    goal: Goal, metric: Metric, counts: MetricCounts, *, error: float, variance: float
) -> np.ndarray:
    """Return whether a goal is proven.

    Args:
        goal: The goal. Superiority by a relative margin means: better than the control's value by this share.
        metric: Its metric.
        counts: The units of both arms.
        error: Probability that a goal that is not true is ever reached.
        variance: Tuning of the sequence, from the plan.
    """
    margin = goal.margin
    if goal.kind is GoalKind.superiority:  # a margin that must be exceeded is a negative tolerance
        effect = _beyond(metric, counts, margin)
    else:
        effect = improvement(metric, counts, tolerated=margin)
    return np.asarray(lower_bound(effect, error=error, variance=variance) > 0)


def is_worse(
    metric: Metric, counts: MetricCounts, *, tolerated: Margin, error: float, variance: float
) -> np.ndarray:
    """Return whether the treatment is proven to be worse than control by more than the tolerated margin.

    Arguments are those of `is_reached` and `improvement`.
    """
    effect = improvement(metric, counts, tolerated=tolerated)
    return np.asarray(upper_bound(effect, error=error, variance=variance) < 0)


def _beyond(metric: Metric, counts: MetricCounts, margin: Margin) -> Effect:
    """Return how much better the treatment is than a control that is better by the margin."""
    opposite = Better.low if metric.better is Better.high else Better.high
    mirrored = Metric(name=metric.name, form=metric.form, better=opposite)
    effect = improvement(mirrored, counts, tolerated=margin)
    return Effect(-effect.estimate, effect.standard_error, effect.units, effect.smallest_arm)
