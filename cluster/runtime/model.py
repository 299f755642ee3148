"""A loaded model version: named columns in, predictions out.

Two engines, both on CPU and without Python in the inner loop: LightGBM's own text format and ONNX Runtime. One
request has few rows, so both run on as many threads as the caller says, one by default; replicas are the way to use
more cores.
"""

from __future__ import annotations

import math
from typing import Protocol

import lightgbm as lgb
import numpy as np
import onnxruntime as ort

from cluster.errors import RefusedError
from cluster.runtime.encoding import Columns, Encoder, Matrix
from cluster.runtime.predictions import Predictions, Scores
from cluster.runtime.signature import ModelSignature, Task

ONNX_INPUT = "inputs"
ONNX_OUTPUT = "scores"


class Engine(Protocol):
    """Runs one file format."""

    @property
    def num_inputs(self) -> int:
        """Columns of the matrix it takes."""
        ...

    def scores(self, matrix: Matrix) -> Scores:
        """Scores of an encoded float32 [rows, inputs]: [rows], or [rows, classes] for a multiclass model."""
        ...


class LightGBMEngine:
    """A LightGBM text model."""

    def __init__(self, text: str, *, num_threads: int = 1) -> None:
        """Parse the text.

        Raises:
            RefusedError: it is no LightGBM model.
        """
        # LightGBM aborts the process on some broken texts, so what can be told without it is.
        if not text.startswith("tree\n") or "end of trees" not in text:
            raise RefusedError("model.txt is no LightGBM text model. Train the version again.")
        try:
            self._booster = lgb.Booster(model_str=text)
        except lgb.basic.LightGBMError as error:
            raise RefusedError(f"model.txt is no LightGBM text model: {error}.") from error
        self._num_threads = num_threads

    @property
    def num_inputs(self) -> int:
        return int(self._booster.num_feature())

    def scores(self, matrix: Matrix) -> Scores:
        return np.asarray(self._booster.predict(matrix, num_threads=self._num_threads), dtype=np.float64)


class OnnxEngine:
    """An ONNX graph from `inputs` float32 [rows, inputs] to `scores`."""

    def __init__(self, data: bytes, *, num_threads: int = 1) -> None:
        """Build a CPU session from the file's bytes, so that no external data can be pulled in.

        Raises:
            RefusedError: it is no ONNX graph, or does not have the named input and output.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A spinning worker thread burns the core that the next request needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise RefusedError(f"model.onnx cannot be loaded: {error}. Train the version again.") from error
        inputs = [one.name for one in self._session.get_inputs()]
        outputs = [one.name for one in self._session.get_outputs()]
        if inputs != [ONNX_INPUT] or outputs != [ONNX_OUTPUT]:
            raise RefusedError(
                f"model.onnx maps {inputs} to {outputs}; it must map ['{ONNX_INPUT}'] to ['{ONNX_OUTPUT}']."
            )

    @property
    def num_inputs(self) -> int:
        return int(self._session.get_inputs()[0].shape[1])

    def scores(self, matrix: Matrix) -> Scores:
        return np.asarray(self._session.run([ONNX_OUTPUT], {ONNX_INPUT: matrix})[0], dtype=np.float64)


class Model:
    """A model version that can predict; safe to call from several threads."""

    def __init__(self, signature: ModelSignature, engine: Engine) -> None:
        """Join a signature and an engine.

        Raises:
            RefusedError: they do not have the same number of inputs.
        """
        if engine.num_inputs != len(signature.inputs):
            raise RefusedError(
                f"The model takes {engine.num_inputs} inputs, its signature names {len(signature.inputs)}. "
                "Train the version again."
            )
        self.signature = signature
        self._engine = engine
        self._encode = Encoder(signature)

    def predict(self, columns: Columns) -> Predictions:
        """Predict named columns, as lists or as an Arrow table; columns that are no input are ignored.

        Raises:
            InvalidRequest: naming the input that is missing or cannot be encoded.
        """
        return self.predict_matrix(self._encode(columns))

    def predict_matrix(self, matrix: Matrix) -> Predictions:
        """Predict rows that are encoded already, float32 [rows, inputs]."""
        if len(matrix) == 0:
            return Predictions(signature=self.signature, scores=_empty(self.signature))
        return Predictions(signature=self.signature, scores=self._engine.scores(matrix))


def _empty(signature: ModelSignature) -> Scores:
    shape = (0, signature.num_scores) if signature.task is Task.multiclass else (0,)
    return np.empty(shape)


def check_scores(model: Model) -> None:
    """Run one row without any known value, to prove that the model gives scores of the shape its task says.

    Raises:
        RefusedError: another shape, or scores that are no numbers.
    """
    matrix = np.full((1, len(model.signature.inputs)), math.nan, dtype=np.float32)
    scores = model.predict_matrix(matrix).scores
    wanted = (1, model.signature.num_scores) if model.signature.task is Task.multiclass else (1,)
    if scores.shape != wanted or not np.isfinite(scores).all():
        raise RefusedError(
            f"The model gives scores of shape {scores.shape} for one row, its {model.signature.task.value} "
            f"signature needs {wanted} finite numbers. Train the version again."
        )
