"""Score logged predictions against their outcomes, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cluster.runtime import OutcomeParser, Task
from cluster.runtime.signature import ModelSignature
from cluster.statistics.quality import Quality, accuracy, brier, squared_error
from serve_apps.rollout.evidence.cohorts import Answer

Signatures = Callable[[int], ModelSignature]
"""Function that returns the signature of a version."""
Outcomes = Mapping[tuple[str, int], Any]
"""The last valid outcome of each row, by prediction id and row."""
_TASKS = {
    Quality.brier: (Task.binary, Task.multiclass),
    Quality.accuracy: (Task.binary, Task.multiclass),
    Quality.squared_error: (Task.regression,),
}


class Scorer:
    """Scores rows of one rollout.

    Args:
        signatures: Returns the signature of a version of the model.
        squared_error_limit: Greatest squared error that is counted.
    """

    def __init__(self, signatures: Signatures, *, squared_error_limit: float) -> None:
        self.signatures = signatures
        self._limit = squared_error_limit
        self._parsers: dict[int, OutcomeParser] = {}

    def parser(self, version: int) -> OutcomeParser:
        """Return the parser of a version's classes or numbers."""
        if version not in self._parsers:
            self._parsers[version] = OutcomeParser(self.signatures(version))
        return self._parsers[version]

    def rows(self, answer: Answer, quality: Quality, outcomes: Outcomes) -> list[float]:
        """Return the values of an answer's rows that have an outcome and a finite score."""
        values = []
        for row, prediction in enumerate(answer.predictions):
            outcome = outcomes.get((answer.prediction_id, row))
            if outcome is not None:
                value = self.value(prediction, outcome, answer.version, quality)
                if value is not None:
                    values.append(value)
        return values

    def value(
        self, prediction: Mapping[str, Any], outcome: Any, version: int, quality: Quality
    ) -> float | None:
        """Return one row's value. None if the prediction has no finite score, or the version has another task."""
        signature = self.signatures(version)
        if signature.task not in _TASKS[quality]:
            return None
        if quality is Quality.squared_error:
            value = prediction.get("value")
            return None if value is None else float(squared_error([value], [outcome], limit=self._limit)[0])
        classes = list(signature.classes or ())
        if outcome not in classes:
            return None
        truth = classes.index(outcome)
        if quality is Quality.accuracy:
            label = self.parser(version).parse(prediction.get("label"))
            return None if label is None else float(accuracy([classes.index(label)], [truth])[0])
        scores = _probabilities(prediction, signature)
        return None if scores is None else float(brier(scores, [truth])[0])

    def worst(self, quality: Quality, version: int) -> float:
        """Return the value of a version that gave no answer where the other one did.

        If such rows were left out, a version could hide its worst rows.
        """
        match quality:
            case Quality.accuracy:
                return 0.0
            case Quality.squared_error:
                return self._limit
            case Quality.brier:
                return 1.0 if self.signatures(version).task is Task.binary else 2.0


def _probabilities(prediction: Mapping[str, Any], signature: ModelSignature) -> np.ndarray | None:
    """Return the probabilities of one row as `brier` takes them, or None if one is missing."""
    if signature.task is Task.binary:
        score = prediction.get("probability")
        return None if score is None else np.array([score])
    shares = prediction.get("probabilities") or {}
    scores = [shares.get(str(name)) for name in signature.classes or ()]
    return None if None in scores else np.array([scores])
