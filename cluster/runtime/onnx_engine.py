"""Engine for ONNX graphs, with ONNX Runtime on the CPU, or on a GPU if the replica has one (`onnx_providers.py`).

A graph has one input, `inputs`, and one used output, `scores`; `docs/guides/own-models.md` defines the contract. Some
graphs of other tools run unchanged: the matrix is cast to the input's float type, and a graph with a fixed number of
rows gets that number of rows per call. Any other graph is refused. The message names the tensor and the fix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from cluster.errors import RefusedError
from cluster.runtime.device_choice import Hardware
from cluster.runtime.encoding import Matrix
from cluster.runtime.onnx_providers import find_providers, report_provider
from cluster.runtime.predictions import Scores
from cluster.runtime.signature import ONNX_FILE, ONNX_INPUT, ONNX_OUTPUT, Precision

RUN_ERRORS = (
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
"""Errors of ONNX Runtime for a graph that it cannot load or run."""
ONE_THREAD = Hardware()
_INPUTS: dict[str, type[Any]] = {"tensor(float)": np.float32, "tensor(double)": np.float64}
_OUTPUTS = {*_INPUTS, "tensor(float16)"}


class OnnxEngine:
    """An ONNX graph that computes `scores` from `inputs`, floats [rows, inputs]."""

    def __init__(
        self, data: bytes, *, precision: Precision = Precision.float32, hardware: Hardware = ONE_THREAD
    ) -> None:
        """Build a session from the file's bytes, so that the graph cannot load data from other files.

        Raises:
            RefusedError: The data is not an ONNX graph, has another precision, or violates the contract.
        """
        try:
            providers = find_providers(hardware, precision, available=ort.get_available_providers())
            self._session = ort.InferenceSession(data, _options(hardware.num_threads), providers=providers)
            actual = precision_of(onnx.load_from_string(data))
        except (*RUN_ERRORS, DecodeError) as error:
            raise RefusedError(
                f"{ONNX_FILE} cannot be loaded by ONNX Runtime: {first_line(error)}"
            ) from error
        if actual is not precision:
            raise RefusedError(
                f"{ONNX_FILE} is {actual.value}, but the version was registered as {precision.value}. Train it again."
            )
        self.provider: str = self._session.get_providers()[0]
        """ONNX Runtime's name of the provider that runs the graph."""
        report_provider(self.provider, hardware, precision)
        graph_input = _require_input(self._session)
        _require_output(self._session)
        self._dtype = _INPUTS[graph_input.type]
        rows, columns = graph_input.shape
        self._num_inputs = int(columns)
        self._fixed_rows = rows if isinstance(rows, int) and rows > 0 else None

    @property
    def num_inputs(self) -> int:
        return self._num_inputs

    def scores(self, matrix: Matrix) -> Scores:
        """Return the scores of a float32 matrix [rows, inputs].

        Raises:
            RefusedError: The graph does not run on these rows.
        """
        rows = matrix if self._dtype is np.float32 else matrix.astype(self._dtype)
        if self._fixed_rows is None or len(rows) == self._fixed_rows:
            return self._run(rows)
        return self._run_in_batches(rows, self._fixed_rows)

    def _run_in_batches(self, rows: Any, size: int) -> Scores:
        """Run the graph on `size` rows per call. The last batch is padded with copies of its last row."""
        results = []
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
            scores = self._run(padded)
            if scores.ndim == 0 or len(scores) != size:
                raise RefusedError(
                    f"{ONNX_FILE} takes {size} rows per call, but returns '{ONNX_OUTPUT}' of shape {scores.shape}: "
                    f"the first dimension must be {size}."
                )
            results.append(scores[: len(batch)])
        return np.concatenate(results)

    def _run(self, rows: Any) -> Scores:
        try:
            scores = self._session.run([ONNX_OUTPUT], {ONNX_INPUT: rows})[0]
        except RUN_ERRORS as error:
            raise RefusedError(
                f"{ONNX_FILE} does not run on '{ONNX_INPUT}' of shape {list(rows.shape)}: {first_line(error)} A graph "
                "for a fixed number of rows must declare this number as the first dimension."
            ) from error
        return np.asarray(scores, dtype=np.float64)


def precision_of(graph: onnx.ModelProto) -> Precision:
    """Return the precision of a graph: int8 if any of its layers multiplies integers, else float32."""
    integer_ops = {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    return Precision.int8 if integer_ops & {node.op_type for node in graph.graph.node} else Precision.float32


def _require_input(session: ort.InferenceSession) -> Any:
    """Return the graph's only input.

    Raises:
        RefusedError: The graph has other inputs, or a matrix does not fit the input's type or shape.
    """
    inputs = session.get_inputs()
    if [tensor.name for tensor in inputs] != [ONNX_INPUT]:
        raise RefusedError(
            f"{ONNX_FILE} has the inputs {_names(inputs)}; it must have one, named '{ONNX_INPUT}', with all columns "
            "of a row. Rename or join them when you export the graph (skl2onnx: "
            f"initial_types=[('{ONNX_INPUT}', FloatTensorType([None, <number of columns>]))])."
        )
    graph_input = inputs[0]
    if graph_input.type not in _INPUTS:
        raise RefusedError(
            f"{ONNX_FILE} takes '{ONNX_INPUT}' as {graph_input.type}, but rows are floats, with NaN for a missing "
            "value. Declare the input as tensor(float), and add a Cast behind it if the graph needs another type."
        )
    if len(graph_input.shape) != 2 or not isinstance(graph_input.shape[1], int):
        raise RefusedError(
            f"{ONNX_FILE} declares '{ONNX_INPUT}' with the shape {graph_input.shape}; it must be [rows, columns] with "
            "a number for the columns. Set that number when you export the graph."
        )
    return graph_input


def _require_output(session: ort.InferenceSession) -> None:
    outputs = {tensor.name: tensor.type for tensor in session.get_outputs()}
    if ONNX_OUTPUT not in outputs:
        raise RefusedError(
            f"{ONNX_FILE} has the outputs {_names(session.get_outputs())}, but no '{ONNX_OUTPUT}'. Rename the "
            "output that has the probabilities or values (an Identity node does; skl2onnx: final_types=[('label', "
            f"Int64TensorType([None])), ('{ONNX_OUTPUT}', FloatTensorType([None, 2]))], options={{'zipmap': False}})."
        )
    if outputs[ONNX_OUTPUT] not in _OUTPUTS:
        raise RefusedError(
            f"{ONNX_FILE} gives '{ONNX_OUTPUT}' as {outputs[ONNX_OUTPUT]}; it must be a tensor of floats: "
            "probabilities or values, no labels and no map (skl2onnx: options={'zipmap': False})."
        )


def _names(tensors: list[Any]) -> str:
    return ", ".join(f"'{tensor.name}'" for tensor in tensors) or "none"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; the rest of ONNX Runtime's messages is about its own source."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _options(num_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors are raised
    # A spinning worker thread would use the core that the next request needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
