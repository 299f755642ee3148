"""A loaded model version: named columns in, predictions out.

A request has few rows, so an engine runs on as many CPU threads as the caller says, one by default; replicas are the
way to use more cores.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from cluster.errors import ModelFailed, RefusedError
from cluster.runtime.encoding import Columns, Encoder, Matrix
from cluster.runtime.predictions import SUM_TOLERANCE, Predictions, Scores
from cluster.runtime.signature import ModelSignature, Task

_SHAPES = {
    Task.binary: "one probability a row: [rows], [rows, 1], or [rows, 2] with both classes' probabilities",
    Task.multiclass: "the probabilities of {classes} classes: [rows, {classes}]",
    Task.regression: "one value a row: [rows] or [rows, 1]",
}
_IMPUTE = (
    "Fill missing values in (ONNX: Where(IsNaN(inputs), mean, inputs) in front of the graph; scikit-learn: "
    "make_pipeline(SimpleImputer(), …) before it is converted)."
)


class Engine(Protocol):
    """Runs one file format."""

    @property
    def num_inputs(self) -> int:
        """Columns of the matrix it takes."""
        ...

    def scores(self, matrix: Matrix) -> Scores:
        """Scores of an encoded float32 [rows, inputs]: [rows], or [rows, classes] for a multiclass model."""
        ...


class Model:
    """A model version that can predict; safe to call from several threads."""

    def __init__(self, signature: ModelSignature, engine: Engine) -> None:
        """Join a signature and an engine, and prove on one row without any known value that they fit.

        Raises:
            RefusedError: other inputs than the signature names, or scores that do not fit its task.
        """
        if engine.num_inputs != signature.width:
            raise RefusedError(
                f"The model takes {engine.num_inputs} inputs, its signature names {signature.width}. It must "
                "take one column for each input of the training set, in their order."
            )
        self.signature = signature
        self._engine = engine
        self.encode = Encoder(signature)
        self._check_scores()

    def predict(self, columns: Columns) -> Predictions:
        """Predict named columns, as lists or as an Arrow table; columns that are no input are ignored.

        Raises:
            InvalidRequest: naming the input that is missing or cannot be encoded.
        """
        return self.predict_matrix(self.encode(columns))

    def predict_matrix(self, matrix: Matrix) -> Predictions:
        """Predict rows that are encoded already, float32 [rows, inputs].

        Raises:
            ModelFailed: it gives another number of scores than there are rows.
        """
        if not len(matrix):
            return Predictions(signature=self.signature, scores=np.empty(self._shape(0)))
        scores = self._in_shape(self._engine.scores(matrix))
        if scores.shape != self._shape(len(matrix)):
            raise ModelFailed(f"gave scores of shape {scores.shape} for {len(matrix)} rows")
        return Predictions(signature=self.signature, scores=scores)

    def _in_shape(self, scores: Scores) -> Scores:
        """The engine's scores as `Predictions` has them.

        A graph of another tool may give a column, [rows, 1], or for a binary task the probabilities of both classes.
        """
        if self.signature.task is Task.multiclass or scores.ndim != 2:
            return scores
        is_pair = self.signature.task is Task.binary and scores.shape[1] == 2
        return scores[:, -1] if is_pair or scores.shape[1] == 1 else scores

    def _shape(self, num_rows: int) -> tuple[int, ...]:
        if self.signature.task is Task.multiclass:
            return (num_rows, self.signature.num_scores)
        return (num_rows,)

    def _check_scores(self) -> None:
        matrix = np.full((1, self.signature.width), math.nan, dtype=np.float32)
        try:
            given = self._engine.scores(matrix)
        except RefusedError as error:
            raise RefusedError(
                f"The model fails on a row without any known value: {error} {_IMPUTE}"
            ) from error
        scores = self._in_shape(given)
        if scores.shape != self._shape(1):
            raise RefusedError(
                f"The model gives scores of shape {given.shape} for one row; {self.signature.task.value} needs "
                f"{_SHAPES[self.signature.task].format(classes=self.signature.num_scores)}."
            )
        if not np.isfinite(scores).all():
            raise RefusedError(
                f"The model gives {given.ravel()[0]} for a row without any known value. A missing value reaches the "
                f"model as NaN, and it must still give a finite score. {_IMPUTE}"
            )
        if given.shape == (1, 2) and scores.shape == (1,) and abs(float(given.sum()) - 1) > SUM_TOLERANCE:
            raise RefusedError(
                f"The model gives two scores for a row of a binary task, and they sum to {given.sum():.3g}, not to 1: "
                "give the probabilities of both classes (a Softmax), or that of the second class alone."
            )
