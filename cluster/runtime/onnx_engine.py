"""Runs an ONNX graph with ONNX Runtime on CPU.

A graph has one input, `inputs`, and gives `scores`; `docs/guides/own-models.md` states the contract. Graphs of other
tools are run as they are where that is safe: the matrix is cast to the input's float type, and a graph with a fixed
number of rows gets as many rows at a time. Anything else is refused with the tensor and the remedy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from cluster.errors import RefusedError
from cluster.runtime.encoding import Matrix
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
"""What ONNX Runtime raises for a graph that it cannot load or run."""
_INPUTS: dict[str, type[Any]] = {"tensor(float)": np.float32, "tensor(double)": np.float64}
_OUTPUTS = {*_INPUTS, "tensor(float16)"}


class OnnxEngine:
    """A graph from `inputs`, floats [rows, inputs], to `scores`."""

    def __init__(
        self, data: bytes, *, precision: Precision = Precision.float32, num_threads: int = 1
    ) -> None:
        """Build a session from the file's bytes, so that it cannot pull in data from other files.

        Raises:
            RefusedError: it is no ONNX graph, is of another precision, or breaks the contract.
        """
        try:
            self._session = ort.InferenceSession(
                data, _options(num_threads), providers=["CPUExecutionProvider"]
            )
            found = precision_of(onnx.load_from_string(data))
        except (*RUN_ERRORS, DecodeError) as error:
            raise RefusedError(
                f"{ONNX_FILE} cannot be loaded by ONNX Runtime: {_first_line(error)}"
            ) from error
        if found is not precision:
            raise RefusedError(
                f"{ONNX_FILE} is {found.value}, and the version was registered as {precision.value}. Train it again."
            )
        given = _only_input(self._session)
        _check_output(self._session)
        self._dtype = _INPUTS[given.type]
        rows, columns = given.shape
        self._num_inputs = int(columns)
        self._fixed_rows = rows if isinstance(rows, int) and rows > 0 else None

    @property
    def num_inputs(self) -> int:
        return self._num_inputs

    def scores(self, matrix: Matrix) -> Scores:
        """Scores of an encoded float32 [rows, inputs].

        Raises:
            RefusedError: the graph does not run on these rows.
        """
        rows = matrix if self._dtype is np.float32 else matrix.astype(self._dtype)
        if self._fixed_rows is None or len(rows) == self._fixed_rows:
            return self._run(rows)
        return self._in_parts(rows, self._fixed_rows)

    def _in_parts(self, rows: Any, size: int) -> Scores:
        """As many rows at a time as the graph takes; the last part is filled up with its last row."""
        parts = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            found = self._run(filled)
            if found.ndim == 0 or len(found) != size:
                raise RefusedError(
                    f"{ONNX_FILE} takes {size} rows at a time, and gives '{ONNX_OUTPUT}' of shape {found.shape} for "
                    f"them: its first dimension must be {size}."
                )
            parts.append(found[: len(part)])
        return np.concatenate(parts)

    def _run(self, rows: Any) -> Scores:
        try:
            found = self._session.run([ONNX_OUTPUT], {ONNX_INPUT: rows})[0]
        except RUN_ERRORS as error:
            raise RefusedError(
                f"{ONNX_FILE} does not run on '{ONNX_INPUT}' of shape {list(rows.shape)}: {_first_line(error)} A graph "
                "that is made for a fixed number of rows must declare it as the first dimension."
            ) from error
        return np.asarray(found, dtype=np.float64)


def precision_of(graph: onnx.ModelProto) -> Precision:
    """What the graph's layers multiply: int8 where any of them does."""
    integer = {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    return Precision.int8 if integer & {node.op_type for node in graph.graph.node} else Precision.float32


def _only_input(session: ort.InferenceSession) -> Any:
    """The graph's input, proved to be one that a matrix can be given to.

    Raises:
        RefusedError: naming the tensor and what to do.
    """
    inputs = session.get_inputs()
    if [one.name for one in inputs] != [ONNX_INPUT]:
        raise RefusedError(
            f"{ONNX_FILE} has the inputs {_names(inputs)}; it must have one, named '{ONNX_INPUT}', with all columns "
            "of a row. Rename or join them when you export the graph (skl2onnx: "
            f"initial_types=[('{ONNX_INPUT}', FloatTensorType([None, <number of columns>]))])."
        )
    only = inputs[0]
    if only.type not in _INPUTS:
        raise RefusedError(
            f"{ONNX_FILE} takes '{ONNX_INPUT}' as {only.type}; rows are given as floats, with NaN for a missing value. "
            "Declare the input as tensor(float), and put a Cast behind it where the graph needs another type."
        )
    if len(only.shape) != 2 or not isinstance(only.shape[1], int):
        raise RefusedError(
            f"{ONNX_FILE} declares '{ONNX_INPUT}' with the shape {only.shape}; it must be [rows, columns] with a "
            "number for the columns. Give that number when you export the graph."
        )
    return only


def _check_output(session: ort.InferenceSession) -> None:
    outputs = {one.name: one.type for one in session.get_outputs()}
    if ONNX_OUTPUT not in outputs:
        raise RefusedError(
            f"{ONNX_FILE} has the outputs {_names(session.get_outputs())}, and none named '{ONNX_OUTPUT}'. Rename the "
            "output that has the probabilities or values (an Identity node does; skl2onnx: final_types=[('label', "
            f"Int64TensorType([None])), ('{ONNX_OUTPUT}', FloatTensorType([None, 2]))], options={{'zipmap': False}})."
        )
    if outputs[ONNX_OUTPUT] not in _OUTPUTS:
        raise RefusedError(
            f"{ONNX_FILE} gives '{ONNX_OUTPUT}' as {outputs[ONNX_OUTPUT]}; it must be a tensor of floats: "
            "probabilities or values, no labels and no map (skl2onnx: options={'zipmap': False})."
        )


def _names(tensors: list[Any]) -> str:
    return ", ".join(f"'{one.name}'" for one in tensors) or "none"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _options(num_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A spinning worker thread burns the core that the next request needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
