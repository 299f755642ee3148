"""The Open Inference Protocol v2 over HTTP: tensors in, tensors out, one named input per feature.

Tensors are JSON, or bytes behind the JSON (the binary tensor data extension, where the header
`Inference-Header-Content-Length` says where the JSON ends). Sources: the protocol's REST specification
(kserve/open-inference-protocol) and Triton's `extension_binary_data`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from cluster.errors import InvalidRequest, nearest
from cluster.runtime.signature import InputSpec, ModelSignature, Task
from serve_apps.predictor.request import fit_values, shown
from serve_apps.predictor.tensors import DATATYPES, RawData, Tensor, parameters_of, read_tensor, to_raw
from serve_apps.replica.http import parse_json

PLATFORM = "falaj"
JSON_LENGTH = "inference-header-content-length"
"""Header with the length of the JSON, in bytes, where binary data stands behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """An output that a request asks for."""

    name: str
    raw: bool
    """As binary data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """A request of `infer`: all features are given."""

    id: str | None
    columns: dict[str, list[Any]]
    count: int
    outputs: tuple[Wanted, ...]
    """In the order of the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """A tensor of an answer."""

    name: str
    datatype: str
    shape: list[int]
    values: list[Any]
    """Row-major."""


def split_body(body: bytes, json_length: list[str]) -> tuple[dict[str, Any], RawData]:
    """The JSON object of an `infer` body and the binary data behind it.

    Args:
        body: all of it.
        json_length: every value given of the header `JSON_LENGTH`.

    Raises:
        InvalidRequest: no JSON object, or a length that is none or beyond the body.
    """
    if not json_length:
        return parse_json(body), RawData()
    given = json_length[0]
    if len(json_length) > 1 or not (given.isascii() and given.isdigit() and len(given) < 20):
        raise InvalidRequest(
            f"Inference-Header-Content-Length must be one number of bytes, got {shown(given)}."
        )
    length = int(given)
    if length > len(body):
        raise InvalidRequest(f"Inference-Header-Content-Length is {length}; the body has {len(body)} bytes.")
    whole = memoryview(body)
    return parse_json(whole[:length]), RawData(whole[length:])


def parse_infer(
    body: dict[str, Any], inputs: dict[str, InputSpec], outputs: tuple[str, ...], raw: RawData
) -> Inference:
    """The request in an `infer` body.

    Args:
        body: its JSON.
        inputs: the model's, all of which must be given, in any order.
        outputs: the names of the model's.
        raw: the binary data behind the JSON.

    Raises:
        InvalidRequest: an input or output that is unknown, missing or given twice, or a shape, datatype or value that
            does not fit.
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
    return Inference(id=request_id, columns=columns, count=count or 0, outputs=_wanted(body, outputs))


def results(signature: ModelSignature, rows: list[dict[str, Any]]) -> tuple[Output, ...]:
    """All outputs of the model, from its answer as rows."""
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


def answered(
    head: dict[str, Any], outputs: tuple[Output, ...], wanted: tuple[Wanted, ...]
) -> tuple[bytes, int | None]:
    """An answer's body, and the length of its JSON where binary data stands behind it.

    Args:
        head: everything but the outputs.
        outputs: the model's.
        wanted: those that were asked for.
    """
    by_name = {output.name: output for output in outputs}
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for one in wanted:
        output = by_name[one.name]
        tensor: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if one.raw:
            parts.append(to_raw(output.datatype, output.values))
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = output.values
        described.append(tensor)
    content = orjson.dumps({**head, "outputs": described})
    return b"".join([content, *parts]), len(content) if parts else None


def metadata(name: str, version: int, signature: ModelSignature) -> dict[str, Any]:
    """The model's metadata answer; `classes` is the order of a multiclass model's probabilities."""
    shapes = {"probabilities": [-1, signature.num_scores]}
    outputs = [
        {"name": output.name, "datatype": output.datatype, "shape": shapes.get(output.name, [-1])}
        for output in results(signature, [])
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
    """The names of a model's outputs."""
    return tuple(output.name for output in results(signature, []))


def datatype(dtype: str) -> str:
    """The protocol's name of an Arrow type."""
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
    """The datatype of a classifier's label output."""
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
        raise InvalidRequest(f"The model has no input '{tensor.name}'.{nearest(tensor.name, inputs)}")
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
    # A tensor of the input's own datatype has its values alone; one of FP64 may hold 1.5 for an input of INT64.
    return values if tensor.datatype is wanted else fit_values(spec, values)


def _wanted(body: dict[str, Any], known: tuple[str, ...]) -> tuple[Wanted, ...]:
    all_raw = _flag(parameters_of(body, "The request"), "binary_data_output", False)
    asked = body.get("outputs")
    if asked is None or asked == []:
        return tuple(Wanted(name=name, raw=all_raw) for name in known)
    if not isinstance(asked, list):
        raise InvalidRequest('"outputs" must be a list of objects with a name.')
    wanted: dict[str, Wanted] = {}
    for content in asked:
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str):
            raise InvalidRequest("Each of the outputs is an object with a name.")
        if name not in known:
            raise InvalidRequest(f"The model has no output '{name}'.{nearest(name, known)}")
        if name in wanted:
            raise InvalidRequest(f"Output '{name}' is asked for twice.")
        raw = _flag(parameters_of(content, f"Output '{name}'"), "binary_data", all_raw)
        wanted[name] = Wanted(name=name, raw=raw)
    return tuple(wanted.values())


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequest(f"Parameter {name} must be true or false, got {shown(value)}.")
    return value


def _vector(name: str, kind: str, values: list[Any]) -> Output:
    return Output(name=name, datatype=kind, shape=[len(values)], values=values)
