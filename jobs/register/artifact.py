"""Read an ONNX graph of another tool: its inputs, and the tensor with the scores.

Two forms of inputs are taken: one matrix, or one input per column. Two forms of outputs are taken: a tensor of numbers,
or a ZipMap (one dictionary per row), which is skl2onnx's default. Everything else is refused, and the message names the
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from cluster.errors import RefusedError
from cluster.runtime.onnx_engine import RUN_ERRORS, first_line
from cluster.runtime.signature import Label

NUMBERS = {TensorProto.FLOAT, TensorProto.DOUBLE}
"""Types with a value for a missing number (NaN)."""
WHOLE = {
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.INT16,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.BOOL,
}
"""Types without a value for a missing number."""
TEXT = TensorProto.STRING
SCORES = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}
MIN_OPSET = 9
"""Oldest version of the standard operators that has `IsNaN` and `Where`."""
DEFAULT_OPSET = 17
"""Version of the standard operators for a graph that has only operators of other domains."""
_PROBABILITIES = ("probabilities", "output_probability", "scores")
_CLASSES = ("classlabels_int64s", "classlabels_ints", "classlabels_strings")


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphInput:
    """One input of the graph, of shape [rows, width]."""

    name: str
    type: int
    """Element type of `onnx.TensorProto`."""
    width: int | None
    """None if the graph takes any number of columns."""

    @property
    def type_name(self) -> str:
        return f"tensor({TensorProto.DataType.Name(self.type).lower()})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A graph, and what registration needs to know of it."""

    tensor_model: onnx.ModelProto
    """The graph with the scores as its only output, and as a tensor."""
    data: bytes
    """Content of the file."""
    inputs: tuple[GraphInput, ...]
    fixed_rows: int | None
    """Number of rows that the graph takes in each call; None if it takes any number."""
    output: str
    """Output of `tensor_model`, floats."""
    classes: tuple[Label, ...] | None
    """Classes in the order of the scores, if the graph has them."""
    texts: tuple[tuple[str, ...], ...]
    """Lists of texts that the graph knows, such as the categories of an encoder."""


def read_artifact(data: bytes, *, path: str, scores: str | None) -> Artifact:
    """Parse a graph.

    Args:
        data: Content of the file.
        path: Path of the file, for error messages.
        scores: Output with the scores; None if there is only one candidate.

    Raises:
        RefusedError: The file is not an ONNX graph, or has inputs or outputs of another form. The message names the
            tensor.
    """
    try:
        model = onnx.load_from_string(data)
        _require_complete(model, path)
    except DecodeError as error:
        raise RefusedError(f"{path} is no ONNX graph: {error}") from error
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), None)
    if opset is not None and opset < MIN_OPSET:
        raise RefusedError(
            f"{path} has operators of version {opset}. Export it with target_opset={MIN_OPSET} or newer."
        )
    constants = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in constants]
    parsed = tuple(_parse_input(one, alone=len(inputs) == 1, path=path) for one in inputs)
    if not parsed:
        raise RefusedError(f"{path} has no inputs.")
    rows = {_fixed(one.type.tensor_type.shape.dim[0]) for one in inputs}
    if len(rows) > 1:
        raise RefusedError(
            f"{path} takes different numbers of rows in its inputs. Export it with a free first dimension."
        )
    found = _find_scores(model, path=path, wanted=scores)
    tensor_model = _with_tensor(model, found)
    try:
        open_session(tensor_model)
    except RUN_ERRORS as error:
        raise RefusedError(f"{path} cannot be loaded by ONNX Runtime: {first_line(error)}") from error
    return Artifact(
        tensor_model=tensor_model,
        data=data,
        inputs=parsed,
        fixed_rows=rows.pop(),
        output=tensor_model.graph.output[0].name,
        classes=found.classes or _classifier_classes(model),
        texts=tuple(_known_texts(model)),
    )


def _require_complete(model: onnx.ModelProto, path: str) -> None:
    for one in model.graph.initializer:
        if one.data_location == TensorProto.EXTERNAL:
            raise RefusedError(
                f"{path} keeps tensor '{one.name}' in another file. Save the graph as one file "
                "(onnx.save(model, path, save_as_external_data=False))."
            )


def _parse_input(tensor: onnx.ValueInfoProto, *, alone: bool, path: str) -> GraphInput:
    if tensor.type.WhichOneof("value") != "tensor_type":
        raise RefusedError(
            f"{path} takes '{tensor.name}' as {tensor.type.WhichOneof('value')}; it must be a tensor."
        )
    element, dims = tensor.type.tensor_type.elem_type, tensor.type.tensor_type.shape.dim
    if element not in NUMBERS | WHOLE | {TEXT}:
        raise RefusedError(
            f"{path} takes '{tensor.name}' as tensor({TensorProto.DataType.Name(element).lower()}); it must be numbers "
            "(float, double, integer, bool) or strings."
        )
    if len(dims) != 2:
        raise RefusedError(
            f"{path} takes '{tensor.name}' with {len(dims)} dimensions; it must be [rows, columns] (skl2onnx: "
            "FloatTensorType([None, <number of columns>]))."
        )
    width = _fixed(dims[1])
    if not alone and width != 1:
        raise RefusedError(
            f"{path} has several inputs, and '{tensor.name}' has {width or 'any number of'} columns. Export the graph "
            "with one matrix, or with one input of shape [rows, 1] for each column."
        )
    return GraphInput(name=tensor.name, type=element, width=width)


def _fixed(dim: Any) -> int | None:
    return int(dim.dim_value) if dim.HasField("dim_value") and dim.dim_value > 0 else None


def open_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """Open a graph on the CPU. ONNX Runtime logs nothing, because its errors are raised."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class _Scores(NamedTuple):
    """The tensor with the scores."""

    tensor: str
    classes: tuple[Label, ...] | None
    """Classes of a ZipMap."""


def _with_tensor(model: onnx.ModelProto, scores: _Scores) -> onnx.ModelProto:
    """Return the graph with the scores as its only output.

    A ZipMap is left out, and the scores are cast to float. Of a model with double inputs, skl2onnx makes a ZipMap of
    doubles, or declares floats as doubles. ONNX Runtime refuses both.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph, name = changed.graph, f"{scores.tensor}/float"
    graph.node.append(helper.make_node("Cast", [scores.tensor], [name], to=TensorProto.FLOAT))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    drop_unused(graph)
    if not any(one.domain in ("", "ai.onnx") for one in changed.opset_import):
        changed.opset_import.append(helper.make_opsetid("", DEFAULT_OPSET))
    return changed


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes and constants that no output needs, such as those of the labels."""
    needed, kept = {one.name for one in graph.output}, []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed.update(node.input)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                needed.update(name for one in inner.node for name in one.input)
                needed.update(one.name for one in inner.output)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [one for one in graph.initializer if one.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _find_scores(model: onnx.ModelProto, *, path: str, wanted: str | None) -> _Scores:
    """Find the tensor with the scores."""
    producers = {name: node for node in model.graph.node for name in node.output}
    names = [one.name for one in model.graph.output]
    if wanted is not None and wanted not in names:
        raise RefusedError(
            f"{path} has no output '{wanted}', but {_list(names)}. Set `scores` to one of them."
        )
    candidates: dict[str, _Scores] = {}
    for one in model.graph.output:
        source = one.name
        while source in producers and producers[source].op_type == "Identity":
            source = producers[source].input[0]
        node = producers.get(source)
        if node is not None and node.op_type == "ZipMap":
            candidates[one.name] = _Scores(node.input[0], _class_attribute(node))
        elif one.type.WhichOneof("value") == "tensor_type" and one.type.tensor_type.elem_type in SCORES:
            candidates[one.name] = _Scores(one.name, None)
    if wanted is not None:
        candidates = {name: found for name, found in candidates.items() if name == wanted}
    elif len(candidates) > 1:
        named = {name: found for name, found in candidates.items() if name in _PROBABILITIES}
        candidates = named if len(named) == 1 else candidates
    if len(candidates) != 1:
        reason = (
            f"several outputs of numbers: {_list(list(candidates))}" if candidates else "none with scores"
        )
        raise RefusedError(
            f"{path} has the outputs {_list(names)}, {reason}. Set `scores` to the output with probabilities or "
            "values; labels are not enough."
        )
    (found,) = candidates.values()
    return found


def _class_attribute(node: onnx.NodeProto) -> tuple[Label, ...] | None:
    for attribute in node.attribute:
        if attribute.name in _CLASSES and (attribute.ints or attribute.strings):
            return tuple(attribute.ints) or tuple(text.decode() for text in attribute.strings)
    return None


def _classifier_classes(model: onnx.ModelProto) -> tuple[Label, ...] | None:
    found = {classes for node in model.graph.node if (classes := _class_attribute(node))}
    return found.pop() if len(found) == 1 else None


def _known_texts(model: onnx.ModelProto) -> Iterator[tuple[str, ...]]:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("cats_strings", "keys_strings") and attribute.strings:
                yield tuple(text.decode() for text in attribute.strings)


def _list(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
