"""The Open Inference Protocol v2 over JSON: tensors in, tensors out, one named input per feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequest
from cluster.runtime.signature import InputSpec, ModelSignature, Task
from serve_apps.predictor.request import MAX_ENTITIES, Scalar, override

PLATFORM = "falaj"
_DATATYPES = frozenset(
    {
        "BOOL",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "FP16",
        "FP32",
        "FP64",
        "BYTES",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inference:
    """A request of `infer`: all features are given."""

    id: str | None
    columns: dict[str, list[Scalar]]
    count: int


def parse_infer(body: dict[str, Any], inputs: dict[str, InputSpec]) -> Inference:
    """The request in an `infer` body.

    Raises:
        InvalidRequest: an input that is unknown, missing or given twice, or a shape or datatype that does not fit.
    """
    tensors = body.get("inputs")
    if not isinstance(tensors, list) or not tensors:
        raise InvalidRequest('Give "inputs" as a list of tensors, one per feature.')
    columns: dict[str, list[Scalar]] = {}
    count: int | None = None
    for tensor in tensors:
        name, values = _tensor(tensor)
        count = len(values) if count is None else count
        if name in columns:
            raise InvalidRequest(f"Input '{name}' is given twice.")
        columns[name] = override(inputs, name, values, count)
    if missing := inputs.keys() - columns.keys():
        raise InvalidRequest(f"Input '{min(missing)}' is missing; the model takes {len(inputs)} inputs.")
    request_id = body.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidRequest('"id" must be text.')
    return Inference(id=request_id, columns=columns, count=count or 0)


def outputs(signature: ModelSignature, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answer's tensors."""
    count = len(rows)
    match signature.task:
        case Task.binary:
            scores = [_output("probability", "FP64", [count], [row["probability"] for row in rows])]
        case Task.multiclass:
            data = [value for row in rows for value in row["probabilities"].values()]
            scores = [_output("probabilities", "FP64", [count, signature.num_scores], data)]
        case Task.regression:
            return [_output("value", "FP64", [count], [row["value"] for row in rows])]
    return [*scores, _output("label", label_datatype(signature), [count], [row["label"] for row in rows])]


def metadata(name: str, version: int, signature: ModelSignature) -> dict[str, Any]:
    """The model's metadata answer."""
    match signature.task:
        case Task.binary:
            scores = [{"name": "probability", "datatype": "FP64", "shape": [-1]}]
        case Task.multiclass:
            scores = [{"name": "probabilities", "datatype": "FP64", "shape": [-1, signature.num_scores]}]
        case Task.regression:
            scores = [{"name": "value", "datatype": "FP64", "shape": [-1]}]
    label = {"name": "label", "datatype": label_datatype(signature), "shape": [-1]}
    return {
        "name": name,
        "versions": [str(version)],
        "platform": PLATFORM,
        "inputs": [
            {"name": spec.name, "datatype": datatype(spec.dtype), "shape": [-1]} for spec in signature.inputs
        ],
        "outputs": scores if signature.task is Task.regression else [*scores, label],
    }


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


def _tensor(tensor: Any) -> tuple[str, list[Scalar]]:
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise InvalidRequest("Each input is an object with name, shape, datatype and data.")
    name, shape, data = tensor["name"], tensor.get("shape"), tensor.get("data")
    if tensor.get("datatype") not in _DATATYPES:
        raise InvalidRequest(f"Input '{name}' has the unknown datatype {tensor.get('datatype')!r}.")
    if not isinstance(data, list) or not isinstance(shape, list):
        raise InvalidRequest(f"Input '{name}' needs shape and data as lists.")
    flat = [value for item in data for value in (item if isinstance(item, list) else [item])]
    if shape not in ([len(flat)], [len(flat), 1]):
        raise InvalidRequest(f"Input '{name}' has shape {shape} and {len(flat)} values; give [n] or [n, 1].")
    if not 1 <= len(flat) <= MAX_ENTITIES:
        raise InvalidRequest(
            f"Input '{name}' has {len(flat)} values; a request has 1 to {MAX_ENTITIES} rows."
        )
    return name, flat


def _output(name: str, kind: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": kind, "shape": shape, "data": data}
