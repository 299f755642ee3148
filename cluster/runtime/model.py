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
from cluster.runtime.predictions import Predictions, Scores
from cluster.runtime.signature import ModelSignature, Task


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
                f"The model takes {engine.num_inputs} inputs, its signature names {signature.width}. "
                "Train the version again."
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
        scores = self._engine.scores(matrix) if len(matrix) else np.empty(self._shape(0))
        if scores.shape != self._shape(len(matrix)):
            raise ModelFailed(f"gave scores of shape {scores.shape} for {len(matrix)} rows")
        return Predictions(signature=self.signature, scores=scores)

    def _shape(self, num_rows: int) -> tuple[int, ...]:
        if self.signature.task is Task.multiclass:
            return (num_rows, self.signature.num_scores)
        return (num_rows,)

    def _check_scores(self) -> None:
        matrix = np.full((1, self.signature.width), math.nan, dtype=np.float32)
        scores = self._engine.scores(matrix)
        if scores.shape != self._shape(1) or not np.isfinite(scores).all():
            raise RefusedError(
                f"The model gives scores of shape {scores.shape} for one row; its {self.signature.task.value} "
                f"signature needs finite numbers of shape {self._shape(1)}. Train the version again."
            )
