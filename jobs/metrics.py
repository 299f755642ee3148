"""Metrics of a model, for training and evaluation: pure functions of scores and targets.

If a metric is undefined for some rows, it is None. An example is the AUC of rows with only one class. NaN is not used,
because the ledger cannot store NaN, and a table would show it like a number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.runtime import Predictions, Task
from cluster.storage import replace_non_finite

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NUM_BINS = 10
EPSILON = 1e-15
"""Probabilities are clipped at this from below before a logarithm."""


def score(predictions: Predictions, target: npt.NDArray[Any]) -> dict[str, Any]:
    """Compute the metrics of the model's task.

    Args:
        predictions: Predictions of some rows.
        target: Target of the same rows: indices of their classes (int64), or their values in a regression.
    """
    signature = predictions.signature
    match signature.task:
        case Task.binary:
            metrics = binary_metrics(predictions.scores, target, threshold=signature.threshold)
        case Task.multiclass:
            metrics = multiclass_metrics(predictions.scores, target)
        case Task.regression:
            metrics = regression_metrics(predictions.scores, target)
    finite_metrics: dict[str, Any] = replace_non_finite(metrics)  # sums of very large values may be infinite
    return finite_metrics


def headline_metric(task: Task) -> str:
    """Return the name of the main metric of a task."""
    return {Task.binary: "auc", Task.multiclass: "accuracy", Task.regression: "rmse"}[task]


def headline(task: Task, metrics: dict[str, Any]) -> str:
    """Return the main metric of the task as text, for example `auc 0.8123`."""
    name = headline_metric(task)
    value = metrics[name]
    if value is not None:
        return f"{name} {value:.6g}" if task is Task.regression else f"{name} {value:.4f}"
    reason = "one class in these rows" if task is Task.binary else "no finite value"
    return f"{name} undefined ({reason})"


def binary_metrics(probabilities: Floats, target: Integers, *, threshold: float = 0.5) -> dict[str, Any]:
    """Return AUC, accuracy, log loss, Brier score, expected calibration error and its calibration bins."""
    bins = calibration(probabilities, target)
    return {
        "rows": len(target),
        "positive_rate": _mean(target),
        "selection_rate": _mean(probabilities >= threshold),
        "mean_probability": _mean(probabilities),
        "auc": roc_auc(probabilities, target),
        "accuracy": _mean((probabilities >= threshold) == (target == 1)),
        "log_loss": log_loss(np.stack([1 - probabilities, probabilities], axis=1), target),
        "brier": _mean((probabilities - target) ** 2),
        "ece": expected_calibration_error(bins),
        "calibration": bins,
    }


def multiclass_metrics(probabilities: Floats, target: Integers) -> dict[str, Any]:
    """Return accuracy, log loss, Brier score over all classes, and the mean one-vs-rest AUC.

    The mean AUC skips classes whose AUC is undefined.
    """
    num_classes = probabilities.shape[1]
    one_hot = np.eye(num_classes)[target]
    aucs = [roc_auc(probabilities[:, k], (target == k).astype(np.int64)) for k in range(num_classes)]
    defined = [auc for auc in aucs if auc is not None]
    return {
        "rows": len(target),
        "accuracy": _mean(probabilities.argmax(axis=1) == target),
        "auc": sum(defined) / len(defined) if defined else None,
        "log_loss": log_loss(probabilities, target),
        "brier": _mean(((probabilities - one_hot) ** 2).sum(axis=1)),
    }


def regression_metrics(values: Floats, target: Floats) -> dict[str, Any]:
    """Return root mean squared error, mean absolute error, R2 and mean error (bias)."""
    error = values - target
    total_squares = float(((target - target.mean()) ** 2).sum()) if len(target) else 0.0
    return {
        "rows": len(target),
        "rmse": math.sqrt(float((error**2).mean())) if len(target) else None,
        "mae": _mean(np.abs(error)),
        "r2": 1.0 - float((error**2).sum()) / total_squares if total_squares > 0 else None,
        "bias": _mean(error),
    }


def roc_auc(scores: Floats, target: Integers) -> float | None:
    """Return the area under the ROC curve: the Mann-Whitney statistic over mid-ranks (Hanley & McNeil 1982).

    Returns:
        None if the target has only one class.
    """
    num_positive = int((target == 1).sum())
    num_negative = len(target) - num_positive
    if num_positive == 0 or num_negative == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mid_ranks = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(mid_ranks[inverse][target == 1].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def log_loss(probabilities: Floats, target: Integers) -> float | None:
    """Return the mean negative log-likelihood; probabilities [rows, classes] are clipped at 1e-15 from below."""
    if len(target) == 0:
        return None
    of_true_class = probabilities[np.arange(len(target)), target]
    return float(-np.log(np.clip(of_true_class, EPSILON, 1.0)).mean())


def calibration(
    probabilities: Floats, target: Integers, *, num_bins: int = NUM_BINS
) -> list[dict[str, float | int]]:
    """Return the predicted and the observed rate in each bin of the predicted probability.

    All bins have the same width. Empty bins are left out.
    """
    bin_of_row = bin_numbers(probabilities, num_bins=num_bins)
    bins: list[dict[str, float | int]] = []
    for number in range(num_bins):
        inside = bin_of_row == number
        if not inside.any():
            continue
        bins.append(
            {
                "lower": number / num_bins,
                "upper": (number + 1) / num_bins,
                "rows": int(inside.sum()),
                "mean_probability": float(probabilities[inside].mean()),
                "positive_rate": float((target[inside] == 1).mean()),
            }
        )
    return bins


def bin_numbers(probabilities: Floats, *, num_bins: int) -> Integers:
    """Return the number of the bin of each probability, from 0."""
    return np.clip((probabilities * num_bins).astype(np.int64), 0, num_bins - 1)


def expected_calibration_error(bins: list[dict[str, float | int]]) -> float | None:
    """Return the mean gap between predicted and observed rate, weighted by rows of a bin (Naeini et al. 2015)."""
    rows = sum(bin_["rows"] for bin_ in bins)
    if not rows:
        return None
    gaps = (bin_["rows"] * abs(bin_["mean_probability"] - bin_["positive_rate"]) for bin_ in bins)
    return float(sum(gaps) / rows)


def _mean(values: npt.NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
