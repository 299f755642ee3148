"""A model's answers: its scores, and the same as rows in the shape of the HTTP contract."""

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
"""How far the probabilities of all classes may be from 1 together: float16 and int8 graphs round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What a model says about some rows."""

    signature: ModelSignature
    scores: Scores
    """Float64. Binary: probability of the positive class, [rows]. Multiclass: probabilities, [rows, classes].
    Regression: values, [rows]."""

    def checked(self) -> Predictions:
        """These, if each row has a finite score.

        Raises:
            ModelFailed: saying how many rows have none. A NaN is below every threshold, so it would become a label.
        """
        scores = self.scores
        if math.isfinite(scores.item()) if scores.size == 1 else bool(np.isfinite(scores).all()):
            return self
        wrong = ~np.isfinite(scores).reshape(len(scores), -1).all(axis=1)
        raise ModelFailed(f"gave no finite score for {int(wrong.sum())} of {len(scores)} rows")

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object a row.

        Binary gives `probability` and `label`, multiclass `probabilities` by class and `label`, regression `value`.
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

    def labels(self) -> list[Label]:
        """The answered class of each row; empty for a regression."""
        return [row["label"] for row in self.rows() if "label" in row]


def check_scores(predictions: Predictions) -> None:
    """Prove that scores mean what the task says, before a version is registered.

    Raises:
        RefusedError: a score that is not finite, no probability, or probabilities that do not sum to 1.
    """
    scores, task = predictions.scores, predictions.signature.task
    by_row = scores.reshape(len(scores), -1)
    if count := int((~np.isfinite(by_row)).any(axis=1).sum()):
        raise RefusedError(
            f"The model gives scores that are not finite for {count} of {len(scores)} held-out rows. It must give a "
            "finite score for every row, also where values are missing or extreme."
        )
    if task is Task.regression or not len(scores):
        return
    last = "Sigmoid" if task is Task.binary else "Softmax"
    if count := int(((by_row < 0) | (by_row > 1)).any(axis=1).sum()):
        raise RefusedError(
            f"The model gives {task.value} scores outside 0 to 1 for {count} of {len(scores)} held-out rows "
            f"({by_row.min():.3g} to {by_row.max():.3g}), which are no probabilities. End it with a {last}."
        )
    if task is Task.multiclass:
        sums = by_row.sum(axis=1)
        if count := int((np.abs(sums - 1) > SUM_TOLERANCE).sum()):
            raise RefusedError(
                f"The probabilities of all classes do not sum to 1 for {count} of {len(scores)} held-out rows "
                f"({sums.min():.3g} to {sums.max():.3g}). End the model with a {last}."
            )


def _multiclass_row(classes: tuple[Label, ...], scores: list[float]) -> dict[str, Any]:
    best = max(range(len(scores)), key=scores.__getitem__)
    named = {str(name): score for name, score in zip(classes, scores, strict=True)}
    return {"probabilities": named, "label": classes[best]}
