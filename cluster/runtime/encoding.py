"""Named columns to the float32 matrix every model takes: the one encoding, for training and for serving.

A category becomes its position in the signature, a missing value or an unknown category NaN. A request of a few
rows comes as lists and is encoded value by value, which beats any vectorised call at that size; a training set comes
as Arrow columns and is encoded at once. Both give the same matrix, which a property test holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import InvalidRequest, did_you_mean
from cluster.runtime.signature import InputSpec, Label, ModelSignature

Matrix = npt.NDArray[np.float32]
Columns = Mapping[str, Sequence[Any]] | pa.Table

_NAN = math.nan
_LARGEST = float(np.finfo(np.float32).max)


def encode(signature: ModelSignature, columns: Columns) -> Matrix:
    """The model's matrix, float32 [rows, inputs], for columns given as lists or as an Arrow table.

    A null is NaN, and so is a category that training did not know. What an explicit NaN in a request means is the
    caller's decision; here it is a missing number. float32 holds integers exactly up to 2^24.

    Raises:
        InvalidRequest: naming the input that is missing, of the wrong type, infinite, or of another length.
    """
    if isinstance(columns, pa.Table):
        return _encode_table(signature, columns)
    encoded = [_encode_values(spec, _column(columns, spec.name)) for spec in signature.inputs]
    num_rows = len(encoded[0])
    for spec, values in zip(signature.inputs, encoded, strict=True):
        if len(values) != num_rows:
            raise InvalidRequest(
                f"Input '{spec.name}' has {len(values)} values, '{signature.inputs[0].name}' has {num_rows}."
            )
    return np.array(encoded, dtype=np.float32).T.copy()


def _column(columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    try:
        return columns[name]
    except KeyError:
        raise InvalidRequest(f"Input '{name}' is missing.{did_you_mean(name, columns)}") from None


def _encode_values(spec: InputSpec, values: Sequence[Any]) -> list[float]:
    if spec.categories is None:
        return [_number(spec, value) for value in values]
    codes = _codes(spec.categories)
    wanted = _kind(spec.categories)
    return [_code(spec, value, codes, wanted) for value in values]


def _number(spec: InputSpec, value: Any) -> float:
    if value is None:
        return _NAN
    if isinstance(value, bool | np.bool_) != (spec.dtype == "bool") or not isinstance(
        value, Real | np.number | np.bool_
    ):
        raise _wrong_type(spec, value)
    number = float(value)
    if abs(number) > _LARGEST:
        raise InvalidRequest(
            f"Input '{spec.name}' is {value!r}, beyond what a float32 can hold ({_LARGEST:.3g})."
        )
    return number


def _code(spec: InputSpec, value: Any, codes: dict[Label, float], wanted: type) -> float:
    if value is None or value != value:
        return _NAN
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise _wrong_type(spec, value)
    return codes.get(value, _NAN)


@functools.cache
def _codes(categories: tuple[Label, ...]) -> dict[Label, float]:
    return {category: float(code) for code, category in enumerate(categories)}


@functools.cache
def _kind(categories: tuple[Label, ...]) -> type:
    if all(isinstance(category, str) for category in categories):
        return str
    return bool if all(isinstance(category, bool) for category in categories) else Real


def _wrong_type(spec: InputSpec, value: Any) -> InvalidRequest:
    wanted = spec.dtype if spec.categories is None else f"a category of type {spec.dtype}"
    return InvalidRequest(f"Input '{spec.name}' must be {wanted} or null, got {value!r}.")


def _encode_table(signature: ModelSignature, table: pa.Table) -> Matrix:
    matrix = np.empty((table.num_rows, len(signature.inputs)), dtype=np.float32)
    for position, spec in enumerate(signature.inputs):
        if spec.name not in table.column_names:
            raise InvalidRequest(f"Input '{spec.name}' is missing.{did_you_mean(spec.name, table.column_names)}")
        encode_column = _encode_numbers if spec.categories is None else _encode_categories
        matrix[:, position] = encode_column(spec, table.column(spec.name))
    return matrix


def _encode_numbers(spec: InputSpec, column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    kind = column.type
    if pa.types.is_boolean(kind) != (spec.dtype == "bool") or not _is_number(kind):
        raise InvalidRequest(f"Input '{spec.name}' must be {spec.dtype}, got a column of {kind}.")
    numbers = pc.fill_null(column.cast(pa.float64(), safe=False), _NAN).to_numpy()
    if np.any(np.abs(numbers) > _LARGEST):
        raise InvalidRequest(f"Input '{spec.name}' has values beyond what a float32 can hold ({_LARGEST:.3g}).")
    return np.asarray(numbers, dtype=np.float64)


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    )


def _encode_categories(spec: InputSpec, column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        known = pa.array(spec.categories, type=column.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InvalidRequest(
            f"Input '{spec.name}' must be a category of type {spec.dtype}, got a column of {column.type}."
        ) from error
    codes = pc.index_in(column, value_set=known, skip_nulls=True)
    return np.asarray(pc.fill_null(codes.cast(pa.float64()), _NAN).to_numpy(), dtype=np.float64)
