"""A model's predictions: the scores, and one JSON object per row for the HTTP answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import ModelFailed, RefusedError
from cluster.runtime.signature import Label, ModelSignature, Task

Scores = npt.NDArray[np.float64]

SUM_TOLERANCE = 1e-3
"""Largest difference between 1 and the sum of all classes' probabilities. float16 and int8 graphs round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """A model's predictions for some rows."""

    signature: ModelSignature
    scores: Scores
    """float64. Binary: probability of the positive class, [rows]. Multiclass: probabilities, [rows, classes].
    Regression: values, [rows]."""

    def require_finite(self) -> Predictions:
        """Return these predictions if every score is finite.

        Without this check, a NaN would get the label of a score below the threshold.

        Raises:
            ModelFailed: Rows have no finite score. The message has their number.
        """
        scores = self.scores
        if math.isfinite(scores.item()) if scores.size == 1 else bool(np.isfinite(scores).all()):
            return self
        is_invalid = ~np.isfinite(scores).reshape(len(scores), -1).all(axis=1)
        raise ModelFailed(f"gave no finite score for {int(is_invalid.sum())} of {len(scores)} rows")

    def rows(self) -> list[dict[str, Any]]:
        """Return one JSON object per row.

        Binary: `probability` and `label`. Multiclass: `probabilities` by class, and `label`. Regression: `value`.
        """
        classes = self.signature.classes
        match self.signature.task, classes:
            case Task.binary, (negative, positive):
                threshold = self.signature.threshold
                return [
                    {"probability": score, "label": positive if score >= threshold else negative}
                    for score in self.scores.tolist()
                ]
            case Task.multiclass, tuple():
                return [_multiclass_row(classes, scores) for scores in self.scores.tolist()]
            case _:
                return [{"value": score} for score in self.scores.tolist()]

    def class_codes(self) -> npt.NDArray[np.int64]:
        """Return the position of each row's predicted class in the signature's classes, as `rows` predicts it.

        All rows are computed together. The scores must be finite, and the task must not be a regression.
        """
        if self.signature.task is Task.binary:
            return (self.scores >= self.signature.threshold).astype(np.int64)
        return np.asarray(self.scores.argmax(axis=1), dtype=np.int64)

    def labels(self) -> list[Label]:
        """Return the predicted class of each row; empty for a regression."""
        return [row["label"] for row in self.rows() if "label" in row]


def check_scores(predictions: Predictions) -> None:
    """Validate the scores for the task, before a version is registered.

    Raises:
        RefusedError: A score is not finite, a probability is outside 0 to 1, or probabilities do not sum to 1.
    """
    scores, task = predictions.scores, predictions.signature.task
    by_row = scores.reshape(len(scores), -1)
    if count := int((~np.isfinite(by_row)).any(axis=1).sum()):
        raise RefusedError(
            f"The model gives scores that are not finite for {count} of {len(scores)} held-out rows. It must give a "
            "finite score for every row, also for missing or extreme values."
        )
    if task is Task.regression or not len(scores):
        return
    last_layer = "Sigmoid" if task is Task.binary else "Softmax"
    if count := int(((by_row < 0) | (by_row > 1)).any(axis=1).sum()):
        raise RefusedError(
            f"The model gives {task.value} scores outside 0 to 1 for {count} of {len(scores)} held-out rows "
            f"({by_row.min():.3g} to {by_row.max():.3g}), which are not probabilities. End the model with a "
            f"{last_layer}."
        )
    if task is Task.multiclass:
        sums = by_row.sum(axis=1)
        if count := int((np.abs(sums - 1) > SUM_TOLERANCE).sum()):
            raise RefusedError(
                f"The probabilities of all classes do not sum to 1 for {count} of {len(scores)} held-out rows "
                f"({sums.min():.3g} to {sums.max():.3g}). End the model with a {last_layer}."
            )


def _multiclass_row(classes: tuple[Label, ...], scores: list[float]) -> dict[str, Any]:
    best = max(range(len(scores)), key=scores.__getitem__)
    probabilities = {str(name): score for name, score in zip(classes, scores, strict=True)}
    return {"probabilities": probabilities, "label": classes[best]}
