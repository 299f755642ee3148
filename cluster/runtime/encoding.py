"""Encode named columns as the float32 matrix that every model takes. Training and serving use the same encoding.

A category becomes its position in the signature. A missing value or an unknown category becomes NaN.

Requests have lists. A short list is encoded value by value, because that is faster than a vectorised call. For a long
list, the types are checked first, and then all values are encoded together. If the check fails, the values are encoded
one by one, to find the wrong value. A training set has Arrow columns; all values of a column are encoded together. All
methods give the same matrix, as a property test checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import NoneType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import InvalidRequest, did_you_mean
from cluster.runtime.list_encoding import MAX_FLOAT32, beyond_float32, list_row, list_rows
from cluster.runtime.signature import InputSpec, Label, ModelSignature

Matrix = npt.NDArray[np.float32]
Columns: TypeAlias = Mapping[str, Sequence[Any]] | pa.Table
EncodeValue: TypeAlias = Callable[[Any], float]
EncodeColumn: TypeAlias = Callable[[Sequence[Any]], Sequence[float]]
EncodeBatch: TypeAlias = Callable[[Sequence[Any]], Sequence[float] | None]
"""Encodes many values together, or returns None if they must be encoded one by one."""

MIN_BATCH = 16
"""Smallest number of values for which it is faster to check all types first."""
_NAN = math.nan


class _InputEncoder(NamedTuple):
    """Encoding of one input."""

    encode_value: EncodeValue
    encode_batch: EncodeBatch
    batch_types: set[Any]
    """`encode_batch` may be used if all values have one of these types."""


class Encoder:
    """Encodes the inputs of one signature. The tables of categories are built once."""

    def __init__(self, signature: ModelSignature) -> None:
        self._inputs = signature.inputs
        self._names = [spec.name for spec in signature.inputs]
        encoders = [_input_encoder(spec) for spec in signature.inputs]
        self._value_encoders = [encoder.encode_value for encoder in encoders]
        self._column_encoders = [_column_encoder(encoder) for encoder in encoders]
        self._width = signature.width
        self._has_lists = any(spec.length is not None for spec in signature.inputs)

    def __call__(self, columns: Columns) -> Matrix:
        """Return the model's matrix, float32 [rows, inputs], for columns given as lists or as an Arrow table.

        Nulls, and categories that were not in the training set, become NaN. NaN in a request is treated as a missing
        number; the caller decides whether to allow it. float32 represents integers exactly up to 2^24.

        Raises:
            InvalidRequest: An input is missing, has a wrong type or length, or has a value that is too large. The
                message names the input.
        """
        if isinstance(columns, pa.Table):
            return self._encode_table(columns)
        inputs = self._input_values(columns)
        if self._has_lists:
            return self._encode_with_lists(inputs)
        if len(inputs[0]) == 1:
            row = [
                encode_value(values[0])
                for encode_value, values in zip(self._value_encoders, inputs, strict=True)
            ]
            return np.array([row], dtype=np.float32)
        encoded = [
            encode_column(values) for encode_column, values in zip(self._column_encoders, inputs, strict=True)
        ]
        return np.array(encoded, dtype=np.float32).T.copy()

    def _encode_with_lists(self, inputs: list[Sequence[Any]]) -> Matrix:
        matrix, position = np.empty((len(inputs[0]), self._width), dtype=np.float32), 0
        for spec, encode_column, values in zip(self._inputs, self._column_encoders, inputs, strict=True):
            if spec.length is None:
                matrix[:, position] = encode_column(values)
            else:
                for row, value in enumerate(values):
                    matrix[row, position : position + spec.length] = list_row(spec, spec.length, value)
            position += spec.width
        return matrix

    def _input_values(self, columns: Mapping[str, Sequence[Any]]) -> list[Sequence[Any]]:
        """Return the values of each input, in order. All inputs must have the same number of values."""
        try:
            inputs = [columns[name] for name in self._names]
        except KeyError:
            missing = next(name for name in self._names if name not in columns)
            raise InvalidRequest(f"Input '{missing}' is missing.{did_you_mean(missing, columns)}") from None
        num_rows = len(inputs[0])
        for name, values in zip(self._names, inputs, strict=True):
            if len(values) != num_rows:
                raise InvalidRequest(
                    f"Input '{name}' has {len(values)} values, '{self._names[0]}' has {num_rows}."
                )
        return inputs

    def _encode_table(self, table: pa.Table) -> Matrix:
        matrix, position = np.empty((table.num_rows, self._width), dtype=np.float32), 0
        names = dict.fromkeys(table.column_names)
        for spec in self._inputs:
            if spec.name not in names:
                raise InvalidRequest(f"Input '{spec.name}' is missing.{did_you_mean(spec.name, names)}")
            column = table.column(spec.name)
            if spec.length is None:
                matrix[:, position] = _encode_column(spec, column)
            else:
                matrix[:, position : position + spec.length] = list_rows(spec, spec.length, column)
            position += spec.width
        return matrix


def encode(signature: ModelSignature, columns: Columns) -> Matrix:
    """Return `Encoder(signature)(columns)`, for a single use."""
    return Encoder(signature)(columns)


def _column_encoder(encoder: _InputEncoder) -> EncodeColumn:
    encode_value, encode_batch, batch_types = encoder

    def encode_column(values: Sequence[Any]) -> Sequence[float]:
        if len(values) >= MIN_BATCH and batch_types.issuperset(map(type, values)):
            encoded = encode_batch(values)
            if encoded is not None:
                return encoded
        return [encode_value(value) for value in values]

    return encode_column


def _input_encoder(spec: InputSpec) -> _InputEncoder:
    if spec.categories is None:
        types: set[Any] = {bool, NoneType} if spec.dtype == "bool" else {int, float, NoneType}
        return _InputEncoder(_number_encoder(spec), _encode_number_batch, types)
    codes: dict[Any, float] = {category: float(code) for code, category in enumerate(spec.categories)}
    is_text = all(isinstance(category, str) for category in spec.categories)

    def encode_category_batch(values: Sequence[Any]) -> Sequence[float]:
        return [codes.get(value, _NAN) for value in values]

    # Numbers and flags are encoded one by one, because True == 1, and because NaN can be a missing category.
    types = {str, NoneType} if is_text else set()
    return _InputEncoder(_category_encoder(spec, spec.categories, codes), encode_category_batch, types)


def _encode_number_batch(values: Sequence[Any]) -> Sequence[float] | None:
    """Encode numbers, or return None if a number is too large. Encoding one by one then raises the error."""
    try:
        numbers = np.array(values, dtype=np.float64)  # None becomes NaN
    except OverflowError:
        return None
    encoded: list[float] = numbers.tolist()
    return None if np.any(np.abs(numbers) > MAX_FLOAT32) else encoded


def _number_encoder(spec: InputSpec) -> EncodeValue:
    is_flag = spec.dtype == "bool"

    def number(value: Any) -> float:
        if type(value) is float and not is_flag and -MAX_FLOAT32 <= value <= MAX_FLOAT32:
            return value  # the usual case; isinstance(value, Real) takes ten times as long
        if value is None:
            return _NAN
        if isinstance(value, bool | np.bool_) != is_flag or not isinstance(value, Real | np.bool_):
            raise _wrong_type(spec, value)
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if abs(result) > MAX_FLOAT32:
            raise beyond_float32(spec)
        return result

    return number


def _category_encoder(spec: InputSpec, categories: tuple[Label, ...], codes: dict[Any, float]) -> EncodeValue:
    is_flag = all(isinstance(category, bool) for category in categories)
    category_type: Any = str if all(isinstance(category, str) for category in categories) else Real

    def code(value: Any) -> float:
        if value is None or value != value:
            return _NAN
        if not isinstance(value, category_type) or isinstance(value, bool) != is_flag:
            raise _wrong_type(spec, value)
        return codes.get(value, _NAN)

    return code


def _wrong_type(spec: InputSpec, value: Any) -> InvalidRequest:
    expected = spec.dtype if spec.categories is None else f"a category of type {spec.dtype}"
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    return InvalidRequest(f"Input '{spec.name}' must be {expected} or null, got {shown}.")


def _encode_column(spec: InputSpec, column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    if pa.types.is_null(column.type):
        return np.full(len(column), _NAN)
    if spec.categories is None:
        return _encode_numbers(spec, column)
    return _encode_categories(spec, column)


def _encode_numbers(spec: InputSpec, column: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not is_number or pa.types.is_boolean(kind) != (spec.dtype == "bool"):
        raise InvalidRequest(f"Input '{spec.name}' must be {spec.dtype}, got a column of {kind}.")
    numbers = pc.fill_null(column.cast(pa.float64(), safe=False), _NAN).to_numpy()
    if np.any(np.abs(numbers) > MAX_FLOAT32):
        raise beyond_float32(spec)
    return np.asarray(numbers, dtype=np.float64)


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
