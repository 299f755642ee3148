"""A loaded model version, which turns named columns into predictions.

A request has few rows, so an engine uses one CPU thread by default. To use more cores, use more replicas.
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
    "Fill missing values in (ONNX: Where(IsNaN(inputs), mean, inputs) in front of the graph; scikit-learn: convert "
    "make_pipeline(SimpleImputer(), …))."
)


class NoScoreForMissingValues(RefusedError):
    """A model gives no valid score for a row of missing values."""


class Engine(Protocol):
    """Runs models of one file format."""

    @property
    def num_inputs(self) -> int:
        """Number of columns of the matrix that the model takes."""
        ...

    def scores(self, matrix: Matrix) -> Scores:
        """Return the scores of a float32 matrix [rows, inputs]: [rows], or [rows, classes] for a multiclass model."""
        ...


class Model:
    """A model version that can predict. It is thread-safe."""

    def __init__(self, signature: ModelSignature, engine: Engine) -> None:
        """Combine a signature and an engine. Predict one row of missing values to verify that they fit together.

        Raises:
            RefusedError: Model and signature have different inputs, or the model's scores do not fit the task.
            NoScoreForMissingValues: The row gets no finite score.
        """
        if engine.num_inputs != signature.width:
            raise RefusedError(
                f"The model takes {engine.num_inputs} inputs, its signature names {signature.width}. It must "
                "take one column for each input of the training set, in the same order."
            )
        self.signature = signature
        self._engine = engine
        self.encode = Encoder(signature)
        self._check_scores()

    @property
    def engine(self) -> Engine:
        """The engine that runs the model."""
        return self._engine

    def predict(self, columns: Columns) -> Predictions:
        """Predict for named columns, given as lists or as an Arrow table. Columns that are not inputs are ignored.

        Raises:
            InvalidRequest: An input is missing or cannot be encoded. The message names the input.
            ModelFailed: See `predict_matrix`.
        """
        return self.predict_matrix(self.encode(columns))

    def predict_matrix(self, matrix: Matrix) -> Predictions:
        """Predict for encoded rows, float32 [rows, inputs].

        Raises:
            ModelFailed: The number of scores differs from the number of rows.
        """
        if not len(matrix):
            return Predictions(signature=self.signature, scores=np.empty(self._shape(0)))
        scores = self._reshape(self._engine.scores(matrix))
        if scores.shape != self._shape(len(matrix)):
            raise ModelFailed(f"gave scores of shape {scores.shape} for {len(matrix)} rows")
        return Predictions(signature=self.signature, scores=scores)

    def _reshape(self, scores: Scores) -> Scores:
        """Convert the engine's scores to the shape of `Predictions`.

        A graph of another tool can return a column, [rows, 1]. For a binary task, it can return both probabilities.
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
            raw_scores = self._engine.scores(matrix)
        except RefusedError as error:
            raise NoScoreForMissingValues(
                f"The model fails on a row of missing values: {error} {_IMPUTE}"
            ) from error
        scores = self._reshape(raw_scores)
        if scores.shape != self._shape(1):
            raise RefusedError(
                f"The model gives scores of shape {raw_scores.shape} for one row; {self.signature.task.value} needs "
                f"{_SHAPES[self.signature.task].format(classes=self.signature.num_scores)}."
            )
        if not np.isfinite(scores).all():
            raise NoScoreForMissingValues(
                f"The model gives {raw_scores.ravel()[0]} for a row of missing values. A missing value reaches the "
                f"model as NaN, and it must still give a finite score. {_IMPUTE}"
            )
        if (
            raw_scores.shape == (1, 2)
            and scores.shape == (1,)
            and abs(float(raw_scores.sum()) - 1) > SUM_TOLERANCE
        ):
            raise RefusedError(
                f"The model gives two scores for a row of a binary task, and they sum to {raw_scores.sum():.3g}, not "
                "to 1. Give the probabilities of both classes (a Softmax), or that of the second class alone."
            )
