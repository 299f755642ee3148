"""Encode lists of numbers as columns of the model's matrix: one list, or a column of lists, with the same result."""

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
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def list_row(spec: InputSpec, length: int, value: Any) -> Numbers:
    """Encode one list as float64 [length]; a missing list is all NaN.

    Raises:
        InvalidRequest: The value is not a list of `length` numbers.
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
        raise beyond_float32(spec) from None
    return _require_float32(spec, numbers)


def list_rows(spec: InputSpec, length: int, column: pa.ChunkedArray) -> Numbers:
    """Encode a column of lists as float64 [rows, length].

    Raises:
        InvalidRequest: A list has another length, or its elements are not numbers.
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
    is_valid = np.asarray(column.is_valid())
    if not pc.all(pc.equal(pc.list_value_length(column), length), min_count=0).as_py():
        raise InvalidRequest(
            f"Input '{spec.name}' must be lists of {length} numbers, some have more or fewer."
        )
    numbers = np.full((len(column), length), math.nan)
    elements = pc.list_flatten(column).cast(pa.float64(), safe=False)
    numbers[is_valid] = np.asarray(pc.fill_null(elements, math.nan)).reshape(-1, length)
    return _require_float32(spec, numbers)


def _require_float32(spec: InputSpec, numbers: Numbers) -> Numbers:
    if np.any(np.abs(numbers) > MAX_FLOAT32):
        raise beyond_float32(spec)
    return numbers


def beyond_float32(spec: InputSpec) -> InvalidRequest:
    """Return the error for a number that is too large for float32."""
    return InvalidRequest(f"Input '{spec.name}' is beyond what a float32 can hold ({MAX_FLOAT32:.3g}).")
