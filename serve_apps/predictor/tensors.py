"""Tensors of the Open Inference Protocol v2: a request's to columns of plain values, an answer's to JSON or raw bytes.

A null in JSON data is a missing value. Raw data has no null: there a NaN is the missing value, as it is for numpy and
pandas, and an infinity is refused, as it is in JSON. Raw data is little-endian and row-major, without padding; an item
of BYTES is its length in four bytes and as many bytes of UTF-8.
"""

from __future__ import annotations

import enum
import math
import struct
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import InvalidRequest
from feature_jobs.store.types.dtypes import MAX_LIST
from serve_apps.predictor.request import MAX_ENTITIES, MAX_INTEGER, Scalar, shown

_LENGTH = struct.Struct("<I")
"""Of an item of BYTES."""


class Kind(enum.Enum):
    """What a model's input can take the place of what."""

    number = "a number"
    flag = "true or false"
    text = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Datatype:
    """One of the protocol's datatypes."""

    name: str
    kind: Kind
    types: frozenset[type]
    """What JSON values of it are read as."""
    item: npt.DTypeLike | None = None
    """An item in raw data; none where items have their own lengths."""
    limits: tuple[int, int] | None = None
    """Least and greatest whole number."""
    greatest: float | None = None
    """Greatest finite number of a floating type, of either sign."""


def _whole(name: str, item: str) -> Datatype:
    bounds = np.iinfo(item)
    # The log and what reads it know no number beyond 64 bits with a sign.
    limits = (max(int(bounds.min), 1 - MAX_INTEGER), min(int(bounds.max), MAX_INTEGER - 1))
    return Datatype(name=name, kind=Kind.number, types=frozenset({int}), item=item, limits=limits)


def _floating(name: str, item: str) -> Datatype:
    greatest = float(np.finfo(item).max)
    types = frozenset({int, float})
    return Datatype(name=name, kind=Kind.number, types=types, item=item, greatest=greatest)


DATATYPES = {
    one.name: one
    for one in (
        Datatype(name="BOOL", kind=Kind.flag, types=frozenset({bool}), item="u1"),
        *(_whole(f"UINT{8 * size}", f"<u{size}") for size in (1, 2, 4, 8)),
        *(_whole(f"INT{8 * size}", f"<i{size}") for size in (1, 2, 4, 8)),
        *(_floating(f"FP{8 * size}", f"<f{size}") for size in (2, 4, 8)),
        Datatype(name="BYTES", kind=Kind.text, types=frozenset({str})),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input as it was given, checked by itself."""

    name: str
    datatype: Datatype
    values: list[Any]
    """One a row: a scalar, or a list where the tensor is wider than one; a list of nulls alone is a null."""
    width: int
    """Values a row."""


class RawData:
    """The bytes after a request's JSON, taken input by input in their order.

    Args:
        data: all of them; none where the request did not say that there are any.
    """

    def __init__(self, data: memoryview | None = None) -> None:
        self._left = memoryview(b"") if data is None else data
        self._announced = data is not None

    def take(self, name: str, size: Any) -> memoryview:
        """The next bytes, those of the named input.

        Raises:
            InvalidRequest: a size that is none, or more than is left.
        """
        if not self._announced:
            raise InvalidRequest(
                f"Input '{name}' has binary_data_size, but the request no Inference-Header-Content-Length."
            )
        if type(size) is not int or not 0 <= size <= len(self._left):
            raise InvalidRequest(
                f"Input '{name}' has binary_data_size {shown(size)}; {len(self._left)} bytes are left."
            )
        taken, self._left = self._left[:size], self._left[size:]
        return taken

    def finish(self) -> None:
        """Nothing may be left.

        Raises:
            InvalidRequest
        """
        if len(self._left):
            raise InvalidRequest(f"{len(self._left)} bytes of binary data belong to no input.")


def read_tensor(content: Any, raw: RawData) -> Tensor:
    """One of a request's `inputs`; of a shape [n] or [n, m], its data nested as the shape says, flat, or raw.

    Raises:
        InvalidRequest: naming the input and what of it does not fit.
    """
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise InvalidRequest("Each input is an object with name, shape, datatype and data.")
    name, stated = content["name"], content.get("datatype")
    datatype = DATATYPES.get(stated) if isinstance(stated, str) else None
    if datatype is None:
        raise InvalidRequest(
            f"Input '{name}' has the unknown datatype {shown(stated)}. Known: {', '.join(DATATYPES)}."
        )
    shape = _shape(name, content.get("shape"))
    parameters = parameters_of(content, f"Input '{name}'")
    if "binary_data_size" not in parameters:
        values = _from_json(name, datatype, shape, content.get("data"))
        return Tensor(name=name, datatype=datatype, values=_rows(name, shape, values), width=_width(shape))
    if "data" in content:
        raise InvalidRequest(f"Input '{name}' has both data and binary_data_size; give one.")
    data = raw.take(name, parameters["binary_data_size"])
    values = _from_raw(name, datatype, shape[0] * _width(shape), data)
    return Tensor(name=name, datatype=datatype, values=_rows(name, shape, values), width=_width(shape))


def parameters_of(content: dict[str, Any], what: str) -> dict[str, Any]:
    """The `parameters` of a request or a tensor; those that nobody here knows are passed over, as the protocol has it.

    Raises:
        InvalidRequest: they are no object, or ask for what is not there and would change the answer.
    """
    parameters = content.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{what}: parameters must be an object, got {type(parameters).__name__}.")
    for unsupported in ("shared_memory_region", "classification"):
        if unsupported in parameters:
            raise InvalidRequest(f"{what}: the extension of '{unsupported}' is not supported here.")
    return parameters


def to_raw(datatype: str, values: list[Any]) -> bytes:
    """Raw data of an answer's tensor."""
    item = DATATYPES[datatype].item
    if item is not None:
        return np.array(values, dtype=item).tobytes()
    texts = [str(value).encode() for value in values]
    return b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))


def _shape(name: str, shape: Any) -> list[int]:
    fits = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not fits or not (len(shape) == 1 or (len(shape) == 2 and 1 <= shape[1] <= MAX_LIST)):
        raise InvalidRequest(
            f"Input '{name}' has shape {shown(shape)}; give [n], [n, 1], or [n, m] for a list."
        )
    if not 1 <= shape[0] <= MAX_ENTITIES:
        raise InvalidRequest(f"Input '{name}' has shape {shape}; a request has 1 to {MAX_ENTITIES} rows.")
    return list(shape)


def _width(shape: list[int]) -> int:
    return shape[1] if len(shape) == 2 else 1


def _rows(name: str, shape: list[int], values: list[Scalar]) -> list[Any]:
    width = _width(shape)
    if width == 1:
        return values
    rows = [values[at : at + width] for at in range(0, len(values), width)]
    if None in values:
        missing = [set(map(type, row)) == {NoneType} for row in rows]
        if any(None in row and not gone for row, gone in zip(rows, missing, strict=True)):
            raise InvalidRequest(
                f"Input '{name}' has a row that is missing in part; a list is whole or missing."
            )
        return [None if gone else row for row, gone in zip(rows, missing, strict=True)]
    return rows


def _from_json(name: str, datatype: Datatype, shape: list[int], data: Any) -> list[Scalar]:
    if not isinstance(data, list):
        raise InvalidRequest(f"Input '{name}' needs data as a list, got {type(data).__name__}.")
    values: list[Any] = data
    width = _width(shape)
    if len(shape) == 2 and set(map(type, data)) == {list} and set(map(len, data)) == {width}:
        values = [value for row in data for value in row]
    if len(values) != shape[0] * width:
        raise InvalidRequest(f"Input '{name}' has shape {shape} and {len(values)} values.")
    found = set(map(type, values)) - {NoneType}
    if not found <= datatype.types:
        wrong = next(value for value in values if value is not None and type(value) not in datatype.types)
        raise InvalidRequest(f"Input '{name}' is {datatype.name}, which cannot hold {shown(wrong)}.")
    if found:
        _check_limits(name, datatype, [value for value in values if value is not None])
    if int in found and float in datatype.types:
        return [None if value is None else float(value) for value in values]
    return values


def _check_limits(name: str, datatype: Datatype, values: list[Any]) -> None:
    if datatype.greatest is not None:
        least, greatest = -datatype.greatest, datatype.greatest
    elif datatype.limits is not None:
        least, greatest = datatype.limits
    else:
        return
    for value in (min(values), max(values)):
        if not least <= value <= greatest:
            raise InvalidRequest(
                f"Input '{name}' is {datatype.name}, from {least} to {greatest} here, got {value}."
            )


def _from_raw(name: str, datatype: Datatype, count: int, data: memoryview) -> list[Scalar]:
    if datatype.item is None:
        return list(_texts(name, count, data))
    item = np.dtype(datatype.item)
    if len(data) != count * item.itemsize:
        raise InvalidRequest(
            f"Input '{name}' has {len(data)} bytes for {count} values of {datatype.name}, "
            f"{item.itemsize} bytes each."
        )
    values: list[Any] = np.frombuffer(data, dtype=item).tolist()
    if datatype.kind is Kind.flag:
        if max(values) > 1:
            raise InvalidRequest(f"Input '{name}' is BOOL, a byte 0 or 1 each, got {max(values)}.")
        return list(map(bool, values))
    if datatype.limits is not None:
        _check_limits(name, datatype, values)
        return values
    if math.isfinite(sum(values)):  # a NaN or an infinity would be in the sum; a look at each is dearer
        return values
    if any(map(math.isinf, values)):
        raise InvalidRequest(f"Input '{name}' must be finite; a missing value is NaN.")
    return [None if math.isnan(value) else value for value in values]


def _texts(name: str, count: int, data: memoryview) -> list[str]:
    whole, size = bytes(data), len(data)
    texts: list[str] = []
    at = 0
    try:
        for position in range(count):
            begin = at + _LENGTH.size
            at = begin + _LENGTH.unpack_from(whole, at)[0] if begin <= size else begin
            if at > size:
                raise InvalidRequest(f"Input '{name}' ends within its item {position} of {count}.")
            texts.append(whole[begin:at].decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"Input '{name}' has an item {len(texts)} that is no UTF-8.") from error
    if at != size:
        raise InvalidRequest(f"Input '{name}' has {size - at} bytes behind its {count} items.")
    return texts
