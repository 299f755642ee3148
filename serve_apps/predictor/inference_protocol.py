"""The Open Inference Protocol v2 over HTTP: tensors in, tensors out, one named input for each feature.

Tensors are JSON, or bytes after the JSON (the binary tensor data extension). If bytes follow, the header
`Inference-Header-Content-Length` has the length of the JSON. Sources: the protocol's REST specification
(kserve/open-inference-protocol) and Triton's `extension_binary_data`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from cluster.errors import InvalidRequest, suggest_name
from cluster.runtime.signature import InputSpec, ModelSignature, Task
from serve_apps.predictor.request import fit_values, shortened
from serve_apps.predictor.tensors import DATATYPES, RawData, Tensor, parameters_of, read_tensor, to_raw
from serve_apps.replica.http import parse_json

PLATFORM = "falaj"
JSON_LENGTH = "inference-header-content-length"
"""Header with the length of the JSON in bytes, if binary data follows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestedOutput:
    """An output that a request asks for."""

    name: str
    raw: bool
    """Whether to send it as binary data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """An `infer` request. It contains all inputs of the model."""

    id: str | None
    columns: dict[str, list[Any]]
    count: int
    """Number of rows."""
    outputs: tuple[RequestedOutput, ...]
    """Requested outputs, in the order of the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """An output tensor."""

    name: str
    datatype: str
    shape: list[int]
    values: list[Any]
    """All values in row-major order."""


def split_body(body: bytes, json_length: list[str]) -> tuple[dict[str, Any], RawData]:
    """Split an `infer` body into its JSON object and the binary data after it.

    Args:
        body: the whole body.
        json_length: all values of the header `JSON_LENGTH`.

    Raises:
        InvalidRequest: the JSON is not an object, or the length is not a number or is larger than the body.
    """
    if not json_length:
        return parse_json(body), RawData()
    text = json_length[0]
    if len(json_length) > 1 or not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidRequest(
            f"Inference-Header-Content-Length must be one number of bytes, got {shortened(text)}."
        )
    length = int(text)
    if length > len(body):
        raise InvalidRequest(f"Inference-Header-Content-Length is {length}; the body has {len(body)} bytes.")
    view = memoryview(body)
    return parse_json(view[:length]), RawData(view[length:])


def parse_infer(
    body: dict[str, Any], inputs: dict[str, InputSpec], outputs: tuple[str, ...], raw: RawData
) -> Inference:
    """Parse an `infer` body.

    Args:
        body: the body's JSON.
        inputs: the model's inputs. The request must have all of them, in any order.
        outputs: names of the model's outputs.
        raw: the binary data after the JSON.

    Raises:
        InvalidRequest: an input or output is unknown, missing or repeated, or a shape, datatype or value does not fit.
    """
    tensors = body.get("inputs")
    if not isinstance(tensors, list) or not tensors:
        raise InvalidRequest('Give "inputs" as a list of tensors, one per feature.')
    columns: dict[str, list[Any]] = {}
    count: int | None = None
    for content in tensors:
        tensor = read_tensor(content, raw)
        values = _input_values(inputs.get(tensor.name), tensor, inputs)
        if tensor.name in columns:
            raise InvalidRequest(f"Input '{tensor.name}' is given twice.")
        count = len(tensor.values) if count is None else count
        if len(tensor.values) != count:
            raise InvalidRequest(f"Input '{tensor.name}' has {len(tensor.values)} values for {count} rows.")
        columns[tensor.name] = values
    raw.finish()
    if missing := inputs.keys() - columns.keys():
        raise InvalidRequest(f"Input '{min(missing)}' is missing; the model takes {len(inputs)} inputs.")
    request_id = body.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidRequest('"id" must be text.')
    return Inference(
        id=request_id, columns=columns, count=count or 0, outputs=_requested_outputs(body, outputs)
    )


def output_tensors(signature: ModelSignature, rows: list[dict[str, Any]]) -> tuple[Output, ...]:
    """Convert predictions, given as rows, to tensors: one for each output of the model."""
    count = len(rows)
    match signature.task:
        case Task.binary:
            scores = _vector("probability", "FP64", [row["probability"] for row in rows])
        case Task.multiclass:
            values = [value for row in rows for value in row["probabilities"].values()]
            shape = [count, signature.num_scores]
            scores = Output(name="probabilities", datatype="FP64", shape=shape, values=values)
        case Task.regression:
            return (_vector("value", "FP64", [row["value"] for row in rows]),)
    return scores, _vector("label", label_datatype(signature), [row["label"] for row in rows])


def encode_answer(
    head: dict[str, Any], outputs: tuple[Output, ...], requested: tuple[RequestedOutput, ...]
) -> tuple[bytes, int | None]:
    """Return an answer's body, and the length of its JSON if binary data follows (else None).

    Args:
        head: all fields of the answer except the outputs.
        outputs: all outputs of the model.
        requested: outputs to send.
    """
    by_name = {output.name: output for output in outputs}
    tensors: list[dict[str, Any]] = []
    raw_parts: list[bytes] = []
    for request in requested:
        output = by_name[request.name]
        tensor: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if request.raw:
            raw_parts.append(to_raw(output.datatype, output.values))
            tensor["parameters"] = {"binary_data_size": len(raw_parts[-1])}
        else:
            tensor["data"] = output.values
        tensors.append(tensor)
    content = orjson.dumps({**head, "outputs": tensors})
    return b"".join([content, *raw_parts]), len(content) if raw_parts else None


def metadata(name: str, version: int, signature: ModelSignature) -> dict[str, Any]:
    """Return the model's metadata. `classes` says in which order a multiclass model returns its probabilities."""
    shapes = {"probabilities": [-1, signature.num_scores]}
    outputs = [
        {"name": output.name, "datatype": output.datatype, "shape": shapes.get(output.name, [-1])}
        for output in output_tensors(signature, [])
    ]
    content: dict[str, Any] = {
        "name": name,
        "versions": [str(version)],
        "platform": PLATFORM,
        "inputs": [
            {
                "name": spec.name,
                "datatype": datatype(spec.dtype),
                "shape": [-1] if spec.length is None else [-1, spec.length],
            }
            for spec in signature.inputs
        ],
        "outputs": outputs,
        "task": signature.task.value,
    }
    return content | ({"classes": list(signature.classes)} if signature.classes is not None else {})


def output_names(signature: ModelSignature) -> tuple[str, ...]:
    """Return the names of a model's outputs."""
    return tuple(output.name for output in output_tensors(signature, []))


def datatype(dtype: str) -> str:
    """Return the protocol's name for an Arrow type."""
    match dtype:
        case "bool":
            return "BOOL"
        case "float" | "float32":
            return "FP32"
        case "double" | "float64":
            return "FP64"
        case "halffloat" | "float16":
            return "FP16"
        case _ if dtype.startswith(("int", "uint")):
            return dtype.upper()
        case _:
            return "BYTES"


def label_datatype(signature: ModelSignature) -> str:
    """Return the datatype of a classifier's label output."""
    match (signature.classes or ("",))[0]:
        case bool():
            return "BOOL"
        case int():
            return "INT64"
        case float():
            return "FP64"
        case _:
            return "BYTES"


def _input_values(spec: InputSpec | None, tensor: Tensor, inputs: dict[str, InputSpec]) -> list[Any]:
    if spec is None:
        raise InvalidRequest(f"The model has no input '{tensor.name}'.{suggest_name(tensor.name, inputs)}")
    wanted = DATATYPES[datatype(spec.dtype)]
    if tensor.datatype.kind is not wanted.kind:
        raise InvalidRequest(
            f"Input '{spec.name}' must be {wanted.kind.value} ({wanted.name}), got {tensor.datatype.name}."
        )
    if tensor.width != spec.width:
        shape = "[n] or [n, 1]" if spec.length is None else f"[n, {spec.length}]"
        raise InvalidRequest(f"Input '{spec.name}' has {tensor.width} values a row; give shape {shape}.")
    values = tensor.values
    if spec.length == 1:
        values = [None if value is None else [value] for value in values]
    # A tensor of the input's own datatype holds only fitting values. An FP64 tensor may hold 1.5 for an INT64 input.
    return values if tensor.datatype is wanted else fit_values(spec, values)


def _requested_outputs(body: dict[str, Any], known: tuple[str, ...]) -> tuple[RequestedOutput, ...]:
    all_raw = _flag(parameters_of(body, "The request"), "binary_data_output", False)
    contents = body.get("outputs")
    if contents is None or contents == []:
        return tuple(RequestedOutput(name=name, raw=all_raw) for name in known)
    if not isinstance(contents, list):
        raise InvalidRequest('"outputs" must be a list of objects with a name.')
    requested: dict[str, RequestedOutput] = {}
    for content in contents:
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str):
            raise InvalidRequest("Each output must be an object with a name.")
        if name not in known:
            raise InvalidRequest(f"The model has no output '{name}'.{suggest_name(name, known)}")
        if name in requested:
            raise InvalidRequest(f"Output '{name}' is requested twice.")
        raw = _flag(parameters_of(content, f"Output '{name}'"), "binary_data", all_raw)
        requested[name] = RequestedOutput(name=name, raw=raw)
    return tuple(requested.values())


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"Parameter {name} must be true or false, got {shortened(value)}.")
    return value


def _vector(name: str, kind: str, values: list[Any]) -> Output:
    return Output(name=name, datatype=kind, shape=[len(values)], values=values)
