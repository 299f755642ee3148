"""Lists of numbers to columns of the model's matrix, one value at a time and a column at once; both give the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import InvalidRequest
from cluster.runtime.signature import InputSpec

Numbers = npt.NDArray[np.float64]
_LARGEST = float(np.finfo(np.float32).max)


def list_row(spec: InputSpec, length: int, value: Any) -> Numbers:
    """One list, float64 [length]; NaN throughout where it is missing.

    Raises:
        InvalidRequest: it is no list of so many numbers.
    """
    if value is None:
        return np.full(length, math.nan)
    types = {bool} if spec.dtype == "bool" else {int, float}
    fits = isinstance(value, np.ndarray) or (isinstance(value, list) and types.issuperset(map(type, value)))
    if not fits or len(value) != length:
        raise InvalidRequest(
            f"Input '{spec.name}' must be a list of {length} numbers ({spec.dtype}) or null."
        )
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except OverflowError:
        raise _beyond(spec) from None
    return _within(spec, numbers)


def list_rows(spec: InputSpec, length: int, column: pa.ChunkedArray) -> Numbers:
    """A column of lists, float64 [rows, length].

    Raises:
        InvalidRequest: a list has another length, or what it holds are no numbers.
    """
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if pa.types.is_null(kind):
        return np.full((len(column), length), math.nan)
    if not is_list or not (
        pa.types.is_primitive(kind.value_type) and not pa.types.is_temporal(kind.value_type)
    ):
        raise InvalidRequest(
            f"Input '{spec.name}' must be lists of {length} numbers, got a column of {kind}."
        )
    known = np.asarray(column.is_valid())
    if not pc.all(pc.equal(pc.list_value_length(column), length), min_count=0).as_py():
        raise InvalidRequest(
            f"Input '{spec.name}' must be lists of {length} numbers, some have more or fewer."
        )
    numbers = np.full((len(column), length), math.nan)
    elements = pc.list_flatten(column).cast(pa.float64(), safe=False)
    numbers[known] = np.asarray(pc.fill_null(elements, math.nan)).reshape(-1, length)
    return _within(spec, numbers)


def _within(spec: InputSpec, numbers: Numbers) -> Numbers:
    if np.any(np.abs(numbers) > _LARGEST):
        raise _beyond(spec)
    return numbers


def _beyond(spec: InputSpec) -> InvalidRequest:
    return InvalidRequest(f"Input '{spec.name}' is beyond what a float32 can hold ({_LARGEST:.3g}).")
