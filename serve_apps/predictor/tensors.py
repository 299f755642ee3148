"""Tensors of the Open Inference Protocol v2: convert a request's tensors to plain values, and an answer's to raw bytes.

In JSON data, null is a missing value. Raw data has no null, so NaN is a missing value, like in numpy and pandas. An
infinity is refused in both. Raw data is little-endian and row-major, without padding. An item of the datatype BYTES is
its length in four bytes, then that many bytes of UTF-8.
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
from serve_apps.predictor.request import MAX_INTEGER, Scalar, shortened
from serve_apps.replica.http_contract import MAX_ENTITIES

_LENGTH = struct.Struct("<I")
"""Format of the length before an item of the datatype BYTES."""


class Kind(enum.Enum):
    """Kind of values. A tensor fits an input only if both have the same kind."""

    number = "a number"
    flag = "true or false"
    text = "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Datatype:
    """One of the protocol's datatypes."""

    name: str
    kind: Kind
    types: frozenset[type]
    """Python types of the JSON values that are allowed."""
    item: npt.DTypeLike | None = None
    """Type of an item in raw data. None if each item has its own length."""
    limits: tuple[int, int] | None = None
    """Smallest and greatest integer that are allowed."""
    greatest: float | None = None
    """Greatest finite number of a floating type. The smallest is its negative."""


def _integer(name: str, item: str) -> Datatype:
    bounds = np.iinfo(item)
    # The prediction log and its readers support only signed 64-bit integers.
    limits = (max(int(bounds.min), 1 - MAX_INTEGER), min(int(bounds.max), MAX_INTEGER - 1))
    return Datatype(name=name, kind=Kind.number, types=frozenset({int}), item=item, limits=limits)


def _floating(name: str, item: str) -> Datatype:
    greatest = float(np.finfo(item).max)
    types = frozenset({int, float})
    return Datatype(name=name, kind=Kind.number, types=types, item=item, greatest=greatest)


DATATYPES = {
    datatype.name: datatype
    for datatype in (
        Datatype(name="BOOL", kind=Kind.flag, types=frozenset({bool}), item="u1"),
        *(_integer(f"UINT{8 * size}", f"<u{size}") for size in (1, 2, 4, 8)),
        *(_integer(f"INT{8 * size}", f"<i{size}") for size in (1, 2, 4, 8)),
        *(_floating(f"FP{8 * size}", f"<f{size}") for size in (2, 4, 8)),
        Datatype(name="BYTES", kind=Kind.text, types=frozenset({str})),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input of a request. It has not been compared with the model's signature yet."""

    name: str
    datatype: Datatype
    values: list[Any]
    """One value for each row: a scalar, or a list if `width` is above 1. A list with only nulls becomes None."""
    width: int
    """Number of values in a row."""


class RawData:
    """The bytes after a request's JSON. The inputs use them in the order of the request.

    Args:
        data: all bytes. None if the request does not have the header with the JSON's length.
    """

    def __init__(self, data: memoryview | None = None) -> None:
        self._left = memoryview(b"") if data is None else data
        self._announced = data is not None

    def take(self, name: str, size: Any) -> memoryview:
        """Return the next bytes, which belong to the named input.

        Raises:
            InvalidRequest: the size is not a number, or is larger than the number of unused bytes.
        """
        if not self._announced:
            raise InvalidRequest(
                f"Input '{name}' has binary_data_size, but the request has no Inference-Header-Content-Length."
            )
        if type(size) is not int or not 0 <= size <= len(self._left):
            raise InvalidRequest(
                f"Input '{name}' has binary_data_size {shortened(size)}; {len(self._left)} bytes are left."
            )
        taken, self._left = self._left[:size], self._left[size:]
        return taken

    def finish(self) -> None:
        """Require that the inputs have used all bytes.

        Raises:
            InvalidRequest: some bytes are unused.
        """
        if len(self._left):
            raise InvalidRequest(f"{len(self._left)} bytes of binary data belong to no input.")


def read_tensor(content: Any, raw: RawData) -> Tensor:
    """Parse one item of a request's `inputs`, of shape [n] or [n, m]. Its data is nested by the shape, flat, or raw.

    Raises:
        InvalidRequest: the input is wrong. The message names it.
    """
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise InvalidRequest("Each input must be an object with name, shape, datatype and data.")
    name, datatype_name = content["name"], content.get("datatype")
    datatype = DATATYPES.get(datatype_name) if isinstance(datatype_name, str) else None
    if datatype is None:
        raise InvalidRequest(
            f"Input '{name}' has the unknown datatype {shortened(datatype_name)}. Known: {', '.join(DATATYPES)}."
        )
    shape = _shape(name, content.get("shape"))
    parameters = parameters_of(content, f"Input '{name}'")
    if "binary_data_size" not in parameters:
        values = _from_json(name, datatype, shape, content.get("data"))
        return Tensor(name=name, datatype=datatype, values=_rows(name, shape, values), width=_width(shape))
    if "data" in content:
        raise InvalidRequest(f"Input '{name}' has both data and binary_data_size; give only one of them.")
    data = raw.take(name, parameters["binary_data_size"])
    values = _from_raw(name, datatype, shape[0] * _width(shape), data)
    return Tensor(name=name, datatype=datatype, values=_rows(name, shape, values), width=_width(shape))


def parameters_of(content: dict[str, Any], owner: str) -> dict[str, Any]:
    """Return the `parameters` of a request or a tensor. The protocol requires that unknown parameters are ignored.

    Raises:
        InvalidRequest: `parameters` is not an object, or names an unsupported extension that would change the answer.
    """
    parameters = content.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{owner}: parameters must be an object, got {type(parameters).__name__}.")
    for unsupported in ("shared_memory_region", "classification"):
        if unsupported in parameters:
            raise InvalidRequest(f"{owner}: the extension of '{unsupported}' is not supported.")
    return parameters


def to_raw(datatype: str, values: list[Any]) -> bytes:
    """Encode an answer's tensor as raw data."""
    item = DATATYPES[datatype].item
    if item is not None:
        return np.array(values, dtype=item).tobytes()
    texts = [str(value).encode() for value in values]
    return b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))


def _shape(name: str, shape: Any) -> list[int]:
    fits = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not fits or not (len(shape) == 1 or (len(shape) == 2 and 1 <= shape[1] <= MAX_LIST)):
        raise InvalidRequest(
            f"Input '{name}' has shape {shortened(shape)}; give [n], [n, 1], or [n, m] for a list."
        )
    if not 1 <= shape[0] <= MAX_ENTITIES:
        raise InvalidRequest(
            f"Input '{name}' has shape {shape}; a request must have 1 to {MAX_ENTITIES} rows."
        )
    return list(shape)


def _width(shape: list[int]) -> int:
    return shape[1] if len(shape) == 2 else 1


def _rows(name: str, shape: list[int], values: list[Scalar]) -> list[Any]:
    width = _width(shape)
    if width == 1:
        return values
    rows = [values[start : start + width] for start in range(0, len(values), width)]
    if None in values:
        all_null = [set(map(type, row)) == {NoneType} for row in rows]
        if any(None in row and not is_null for row, is_null in zip(rows, all_null, strict=True)):
            raise InvalidRequest(
                f"Input '{name}' has a row with some nulls; a list has either no null or only nulls."
            )
        return [None if is_null else row for row, is_null in zip(rows, all_null, strict=True)]
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
    types = set(map(type, values)) - {NoneType}
    if not types <= datatype.types:
        wrong = next(value for value in values if value is not None and type(value) not in datatype.types)
        raise InvalidRequest(f"Input '{name}' is {datatype.name}, which cannot hold {shortened(wrong)}.")
    if types:
        _check_limits(name, datatype, [value for value in values if value is not None])
    if int in types and float in datatype.types:
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
    # A NaN or an infinity makes the sum non-finite. Testing the sum is faster than testing each value.
    if math.isfinite(sum(values)):
        return values
    if any(map(math.isinf, values)):
        raise InvalidRequest(f"Input '{name}' must be finite; a missing value is NaN.")
    return [None if math.isnan(value) else value for value in values]


def _texts(name: str, count: int, data: memoryview) -> list[str]:
    content, size = bytes(data), len(data)
    texts: list[str] = []
    end = 0
    try:
        for position in range(count):
            start = end + _LENGTH.size
            end = start + _LENGTH.unpack_from(content, end)[0] if start <= size else start
            if end > size:
                raise InvalidRequest(f"Input '{name}' ends within its item {position} of {count}.")
            texts.append(content[start:end].decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"Item {len(texts)} of input '{name}' is not UTF-8.") from error
    if end != size:
        raise InvalidRequest(f"Input '{name}' has {size - end} bytes behind its {count} items.")
    return texts
