"""Runs an ONNX graph with ONNX Runtime on CPU."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from cluster.errors import RefusedError
from cluster.runtime.encoding import Matrix
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import ONNX_FILE, ONNX_INPUT, ONNX_OUTPUT, Precision

_LOAD_ERRORS = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)


class OnnxEngine:
    """A graph from `inputs`, float32 [rows, inputs], to `scores`."""

    def __init__(
        self, data: bytes, *, precision: Precision = Precision.float32, num_threads: int = 1
    ) -> None:
        """Build a session from the file's bytes, so that it cannot pull in data from other files.

        Raises:
            RefusedError: it is no ONNX graph, does not have the named input and output, or is of another precision.
        """
        try:
            self._session = ort.InferenceSession(
                data, _options(num_threads), providers=["CPUExecutionProvider"]
            )
        except _LOAD_ERRORS as error:
            raise RefusedError(f"{ONNX_FILE} cannot be loaded: {error}. Train the version again.") from error
        if (found := precision_of(onnx.load_from_string(data))) is not precision:
            raise RefusedError(
                f"{ONNX_FILE} is {found.value}, and the version was registered as {precision.value}. Train it again."
            )
        inputs = {one.name: one.shape for one in self._session.get_inputs()}
        outputs = [one.name for one in self._session.get_outputs()]
        if list(inputs) != [ONNX_INPUT] or outputs != [ONNX_OUTPUT]:
            raise RefusedError(
                f"{ONNX_FILE} maps {list(inputs)} to {outputs}; it must map '{ONNX_INPUT}' to '{ONNX_OUTPUT}'."
            )
        if len(inputs[ONNX_INPUT]) != 2 or not isinstance(inputs[ONNX_INPUT][1], int):
            raise RefusedError(
                f"{ONNX_FILE} must fix the second dimension of '{ONNX_INPUT}', which is {inputs[ONNX_INPUT]}."
            )
        self._num_inputs = int(inputs[ONNX_INPUT][1])

    @property
    def num_inputs(self) -> int:
        return self._num_inputs

    def scores(self, matrix: Matrix) -> Scores:
        return np.asarray(self._session.run([ONNX_OUTPUT], {ONNX_INPUT: matrix})[0], dtype=np.float64)


def precision_of(graph: onnx.ModelProto) -> Precision:
    """What the graph's layers multiply: int8 where any of them does."""
    integer = {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    return Precision.int8 if integer & {node.op_type for node in graph.graph.node} else Precision.float32


def _options(num_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A spinning worker thread burns the core that the next request needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
