"""Confidence intervals of metrics by the bootstrap, with entities as the unit that is drawn.

Several rows of one person are not independent. If rows were drawn, the intervals would be too narrow. So each replicate
draws as many entities as there are, with replacement, and a row counts as often as its entity was drawn (the cluster
bootstrap: Field & Welsh 2007, "Bootstrapping clustered data"). An interval is the percentile interval of the replicates
(Efron & Tibshirani 1993, chapter 13).

A replicate is a vector of weights, one for each row. All metrics are computed from a block of such vectors at once. The
size of a block is limited, so the memory does not grow with the number of replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.runtime import Predictions, Task
from jobs.metrics import EPSILON, NUM_BINS, bin_numbers

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], dict[str, Floats]]
"""Computes metrics [replicates] from weights [replicates, rows]. An undefined metric is NaN."""
Interval = list[float]
"""Lower and upper end."""

BLOCK = 4_000_000
"""Number of weights in a block: 32 MB. About six arrays of this size exist at once."""
MAX_UNDEFINED = 0.05
"""A metric that is undefined in a larger share of the replicates has no interval."""
MAX_CLASSES = 50
"""With more classes, the mean AUC gets no interval, because each class needs its own order of the rows."""


def intervals(
    statistics: Sequence[Statistic],
    entities: npt.NDArray[np.int64],
    *,
    replicates: int,
    level: float,
    seed: int,
) -> dict[str, Interval | None]:
    """Return the interval of each metric, or None if the metric is undefined too often.

    Args:
        statistics: Functions that compute the metrics.
        entities: For each row, the number of its entity, from 0.
        replicates: Number of draws.
        level: Share of the intervals that are to contain the true value, for example 0.95.
        seed: Seed of the draws.
    """
    blocks: dict[str, list[Floats]] = {}
    for weights in _weights(entities, replicates=replicates, seed=seed):
        for statistic in statistics:
            for name, values in statistic(weights).items():
                blocks.setdefault(name, []).append(values)
    return {name: _percentiles(np.concatenate(values), level) for name, values in blocks.items()}


def metric_statistic(predictions: Predictions, target: npt.NDArray[Any]) -> Statistic:
    """Return the function that computes the metrics of `jobs.metrics.score` from weights."""
    match predictions.signature.task:
        case Task.binary:
            return _binary(predictions.scores, target, threshold=predictions.signature.threshold)
        case Task.multiclass:
            return _multiclass(predictions.scores, target)
        case Task.regression:
            return _regression(predictions.scores, target)


def weighted_means(columns: dict[str, npt.NDArray[Any]]) -> Statistic:
    """Return the function that computes the weighted mean of each column."""
    names, values = list(columns), np.column_stack(list(columns.values())).astype(np.float64)

    def compute(weights: Floats) -> dict[str, Floats]:
        means = (weights @ values) / weights.sum(axis=1, keepdims=True)
        return dict(zip(names, means.T, strict=True))

    return compute


def group_sums(weights: Floats, starts: npt.NDArray[np.int64]) -> Floats:
    """Return sums of consecutive columns: [replicates, groups]. `starts` has the first column of each group."""
    return np.asarray(np.add.reduceat(weights, starts, axis=1))


def first_of_each(sorted_values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the position of the first of each run of equal values."""
    if not len(sorted_values):
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(np.concatenate([[True], sorted_values[1:] != sorted_values[:-1]]))


def _weights(entities: npt.NDArray[np.int64], *, replicates: int, seed: int) -> Iterator[Floats]:
    """Yield blocks of weights, float64 [replicates, rows]."""
    draw = np.random.default_rng(seed)
    num_entities = int(entities.max()) + 1
    size = max(1, BLOCK // len(entities))
    for start in range(0, replicates, size):
        counts = [
            np.bincount(draw.integers(num_entities, size=num_entities), minlength=num_entities)
            for _ in range(min(size, replicates - start))
        ]
        yield np.stack([count[entities] for count in counts]).astype(np.float64)


def _percentiles(values: Floats, level: float) -> Interval | None:
    defined = values[np.isfinite(values)]
    if len(defined) < (1 - MAX_UNDEFINED) * len(values) or not len(defined):
        return None
    tail = (1 - level) / 2
    return [float(value) for value in np.quantile(defined, [tail, 1 - tail])]


def _binary(probabilities: Floats, target: npt.NDArray[Any], *, threshold: float) -> Statistic:
    of_true_class = np.where(target == 1, probabilities, 1 - probabilities)
    means = weighted_means(
        {
            "positive_rate": target == 1,
            "selection_rate": probabilities >= threshold,
            "mean_probability": probabilities,
            "accuracy": (probabilities >= threshold) == (target == 1),
            "log_loss": -np.log(np.clip(of_true_class, EPSILON, 1.0)),
            "brier": (probabilities - target) ** 2,
        }
    )
    auc = _auc(probabilities, target == 1)
    order = np.argsort(probabilities, kind="stable")
    starts = first_of_each(bin_numbers(probabilities[order], num_bins=NUM_BINS))
    gaps = (probabilities - target)[order]

    def compute(weights: Floats) -> dict[str, Floats]:
        in_bins = np.abs(group_sums(weights[:, order] * gaps, starts))
        return {
            **means(weights),
            "auc": auc(weights),
            "ece": in_bins.sum(axis=1) / weights.sum(axis=1),
        }

    return compute


def _multiclass(probabilities: Floats, target: npt.NDArray[Any]) -> Statistic:
    num_classes = probabilities.shape[1]
    one_hot = np.eye(num_classes)[target]
    of_true_class = probabilities[np.arange(len(target)), target]
    means = weighted_means(
        {
            "accuracy": probabilities.argmax(axis=1) == target,
            "log_loss": -np.log(np.clip(of_true_class, EPSILON, 1.0)),
            "brier": ((probabilities - one_hot) ** 2).sum(axis=1),
        }
    )
    if num_classes > MAX_CLASSES:
        return means
    aucs = [_auc(probabilities[:, k], target == k) for k in range(num_classes)]

    def compute(weights: Floats) -> dict[str, Floats]:
        by_class = np.stack([auc(weights) for auc in aucs])
        defined = np.isfinite(by_class)
        with np.errstate(invalid="ignore"):  # no class has an AUC: NaN
            mean = np.where(defined, by_class, 0.0).sum(axis=0) / defined.sum(axis=0)
        return {**means(weights), "auc": mean}

    return compute


def _regression(values: Floats, target: npt.NDArray[Any]) -> Statistic:
    error = values - target
    centred = target - target.mean()
    means = weighted_means(
        {
            "square": error**2,
            "mae": np.abs(error),
            "bias": error,
            "centred": centred,
            "centred_square": centred**2,
        }
    )

    def compute(weights: Floats) -> dict[str, Floats]:
        mean = means(weights)
        variance = mean["centred_square"] - mean["centred"] ** 2
        with np.errstate(divide="ignore", invalid="ignore"):  # a constant target: NaN
            r2 = np.where(variance > 0, 1 - mean["square"] / variance, np.nan)
        return {"rmse": np.sqrt(mean["square"]), "mae": mean["mae"], "r2": r2, "bias": mean["bias"]}

    return compute


def _auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> Callable[[Floats], Floats]:
    """Return the function that computes the weighted AUC. Rows with the same score count half."""
    order = np.argsort(scores, kind="stable")
    starts = first_of_each(scores[order])
    is_positive = positive[order].astype(np.float64)

    def compute(weights: Floats) -> Floats:
        sorted_weights = weights[:, order]
        positives = group_sums(sorted_weights * is_positive, starts)
        negatives = group_sums(sorted_weights, starts) - positives
        below = np.cumsum(negatives, axis=1) - negatives / 2
        pairs = positives.sum(axis=1) * negatives.sum(axis=1)
        with np.errstate(invalid="ignore"):  # a replicate with one class: 0 / 0 is NaN
            return np.asarray((positives * below).sum(axis=1) / pairs)

    return compute
