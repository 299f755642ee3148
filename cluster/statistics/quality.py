"""Quality of predictions whose outcomes are known, as one number for each unit.

A unit enters a metric once, when the outcome window of its requests is over. Its value is the mean over its rows, so a
unit with many requests has the same weight as one with a single request.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

from cluster.statistics.mixtures import FloatArray


class Quality(enum.StrEnum):
    """How a row's prediction is scored against its outcome."""

    brier = "brier"
    """Lower is better; for binary and multiclass models."""
    squared_error = "squared_error"
    """Lower is better; for regressions."""
    accuracy = "accuracy"
    """Higher is better; for binary and multiclass models."""


def brier(probabilities: ArrayLike, outcomes: ArrayLike) -> FloatArray:
    """Return each row's Brier score, from 0 (best) to 2; for a binary model to 1.

    Args:
        probabilities: Of a binary model, [rows]: the probability of class 1. Of a multiclass model, [rows, classes].
        outcomes: Position of the true class, integer, [rows].

    Source: Brier, "Verification of forecasts expressed in terms of probability" (1950). For a binary model, it is half
    of the original sum over both classes, as usual.
    """
    given, truth = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.int64)
    if given.ndim == 1:
        return np.asarray((given - truth) ** 2)
    return np.asarray(((given - np.eye(given.shape[1])[truth]) ** 2).sum(-1))


def squared_error(predictions: ArrayLike, outcomes: ArrayLike, *, limit: float) -> FloatArray:
    """Return each row's squared error, at most `limit`, in the squared unit of the outcome.

    A version that rarely gives a huge value would otherwise make the variance so great that no harm is ever proven.
    So the policy fixes the limit. A prediction that is not finite counts as the limit.

    Args:
        predictions: Values of the model, [rows].
        outcomes: Finite true values, [rows].
        limit: Greatest squared error that is counted.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        errors = (np.asarray(predictions, np.float64) - np.asarray(outcomes, np.float64)) ** 2
    return np.where(errors <= limit, errors, limit)  # a comparison with NaN is false


def accuracy(labels: ArrayLike, outcomes: ArrayLike) -> FloatArray:
    """Return 1 for each row whose label, as a position of a class, is the outcome, and 0 for the others."""
    return np.asarray(np.asarray(labels) == np.asarray(outcomes), np.float64)


def unit_means(units: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, FloatArray]:
    """Return the distinct units in sorted order, and the mean of each unit's values.

    Args:
        units: The unit of each row, [rows].
        values: The value of each row, [rows].
    """
    distinct, positions = np.unique(np.asarray(units), return_inverse=True)
    sums = np.bincount(positions, weights=np.asarray(values, np.float64), minlength=len(distinct))
    return distinct, sums / np.maximum(np.bincount(positions, minlength=len(distinct)), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedConditions:
    """What must hold so that both versions may be compared on the same logged requests."""

    outcomes_independent_of_predictions: bool
    """The prediction has no influence on the outcome, as declared by the policy."""
    requests_after_training_data: bool
    """All requests are later than the training data of both versions."""
    features_as_of_request: bool
    """The features are those that were known at the time of the request."""
    one_value_per_unit: bool
    """Each unit gives one difference."""


def failed_conditions(conditions: PairedConditions) -> tuple[str, ...]:
    """Return the names of the conditions that do not hold. A paired comparison is allowed only if there are none."""
    return tuple(field.name for field in fields(conditions) if not getattr(conditions, field.name))
