"""Named columns to the float32 matrix every model takes: the one encoding, for training and for serving.

A category becomes its position in the signature, a missing value or an unknown category NaN. A request of a few
rows comes as lists and is encoded value by value, which beats any vectorised call at that size; a list of many values
is looked at by type first and then encoded as a whole, and value by value only to say what is wrong with it; a training
set comes as Arrow columns and is encoded at once. All give the same matrix, which a property test holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import NoneType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import InvalidRequest, did_you_mean
from cluster.runtime.list_encoding import list_row, list_rows
from cluster.runtime.signature import InputSpec, Label, ModelSignature

Matrix = npt.NDArray[np.float32]
Columns: TypeAlias = Mapping[str, Sequence[Any]] | pa.Table
ByValue: TypeAlias = Callable[[Any], float]
ByColumn: TypeAlias = Callable[[Sequence[Any]], Sequence[float]]
AtOnce: TypeAlias = Callable[[Sequence[Any]], Sequence[float] | None]

MANY = 16
"""From so many values on, looking at their types first pays."""
_NAN = math.nan
_LARGEST = float(np.finfo(np.float32).max)


class Encoder:
    """The encoding of one signature, with its category tables built once."""

    def __init__(self, signature: ModelSignature) -> None:
        self._inputs = signature.inputs
        self._names = [spec.name for spec in signature.inputs]
        encoders = [_encoders(spec) for spec in signature.inputs]
        self._by_value = [by_value for by_value, _, _ in encoders]
        self._by_column = [_by_column(*encoder) for encoder in encoders]
        self._width = signature.width
        self._has_lists = any(spec.length is not None for spec in signature.inputs)

    def __call__(self, columns: Columns) -> Matrix:
        """The model's matrix, float32 [rows, inputs], for columns given as lists or as an Arrow table.

        A null is NaN, and so is a category that training did not know. What an explicit NaN in a request means is
        the caller's decision; here it is a missing number. float32 holds integers exactly up to 2^24.

        Raises:
            InvalidRequest: naming the input that is missing, of the wrong type, too large, or of another length.
        """
        if isinstance(columns, pa.Table):
            return self._encode_table(columns)
        given = self._given(columns)
        if self._has_lists:
            return self._encode_with_lists(given)
        if len(given[0]) == 1:
            row = [by_value(values[0]) for by_value, values in zip(self._by_value, given, strict=True)]
            return np.array([row], dtype=np.float32)
        encoded = [by_column(values) for by_column, values in zip(self._by_column, given, strict=True)]
        return np.array(encoded, dtype=np.float32).T.copy()

    def _encode_with_lists(self, given: list[Sequence[Any]]) -> Matrix:
        matrix, at = np.empty((len(given[0]), self._width), dtype=np.float32), 0
        for spec, by_column, values in zip(self._inputs, self._by_column, given, strict=True):
            if spec.length is None:
                matrix[:, at] = by_column(values)
            else:
                for row, value in enumerate(values):
                    matrix[row, at : at + spec.length] = list_row(spec, spec.length, value)
            at += spec.width
        return matrix

    def _given(self, columns: Mapping[str, Sequence[Any]]) -> list[Sequence[Any]]:
        """Each input's values, as many of one as of another."""
        try:
            given = [columns[name] for name in self._names]
        except KeyError:
            missing = next(name for name in self._names if name not in columns)
            raise InvalidRequest(f"Input '{missing}' is missing.{did_you_mean(missing, columns)}") from None
        num_rows = len(given[0])
        for name, values in zip(self._names, given, strict=True):
            if len(values) != num_rows:
                raise InvalidRequest(
                    f"Input '{name}' has {len(values)} values, '{self._names[0]}' has {num_rows}."
                )
        return given

    def _encode_table(self, table: pa.Table) -> Matrix:
        matrix, at = np.empty((table.num_rows, self._width), dtype=np.float32), 0
        there = dict.fromkeys(table.column_names)
        for spec in self._inputs:
            if spec.name not in there:
                raise InvalidRequest(f"Input '{spec.name}' is missing.{did_you_mean(spec.name, there)}")
            column = table.column(spec.name)
            if spec.length is None:
                matrix[:, at] = _encode_column(spec, column)
            else:
                matrix[:, at : at + spec.length] = list_rows(spec, spec.length, column)
            at += spec.width
        return matrix


def encode(signature: ModelSignature, columns: Columns) -> Matrix:
    """`Encoder(signature)(columns)`, for a single use."""
    return Encoder(signature)(columns)


def _by_column(by_value: ByValue, at_once: AtOnce, types: set[Any]) -> ByColumn:
    def column(values: Sequence[Any]) -> Sequence[float]:
        if len(values) >= MANY and types.issuperset(map(type, values)):
            encoded = at_once(values)
            if encoded is not None:
                return encoded
        return [by_value(value) for value in values]

    return column


def _encoders(spec: InputSpec) -> tuple[ByValue, AtOnce, set[Any]]:
    """How one value and how many are encoded, the latter only where all are of these types."""
    if spec.categories is None:
        types: set[Any] = {bool, NoneType} if spec.dtype == "bool" else {int, float, NoneType}
        return _number_encoder(spec), _numbers_at_once, types
    codes: dict[Any, float] = {category: float(code) for code, category in enumerate(spec.categories)}
    textual = all(isinstance(category, str) for category in spec.categories)

    def categories_at_once(values: Sequence[Any]) -> Sequence[float]:
        return [codes.get(value, _NAN) for value in values]

    # Numbers and flags are looked at one by one, because True == 1 and a NaN may be a missing category.
    types = {str, NoneType} if textual else set()
    return _category_encoder(spec, spec.categories, codes), categories_at_once, types


def _numbers_at_once(values: Sequence[Any]) -> Sequence[float] | None:
    """None where one is too large, which only looking at each can say."""
    try:
        numbers = np.array(values, dtype=np.float64)  # a None becomes NaN
    except OverflowError:
        return None
    found: list[float] = numbers.tolist()
    return None if np.any(np.abs(numbers) > _LARGEST) else found


def _number_encoder(spec: InputSpec) -> ByValue:
    is_flag = spec.dtype == "bool"

    def number(value: Any) -> float:
        if type(value) is float and not is_flag and -_LARGEST <= value <= _LARGEST:
            return value  # nearly all are, and asking whether one is a Real takes ten times as long
        if value is None:
            return _NAN
        if isinstance(value, bool | np.bool_) != is_flag or not isinstance(value, Real | np.bool_):
            raise _wrong_type(spec, value)
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if abs(result) > _LARGEST:
            raise InvalidRequest(f"Input '{spec.name}' is beyond what a float32 can hold ({_LARGEST:.3g}).")
        return result

    return number


def _category_encoder(spec: InputSpec, categories: tuple[Label, ...], codes: dict[Any, float]) -> ByValue:
    is_flag = all(isinstance(category, bool) for category in categories)
    wanted: Any = str if all(isinstance(category, str) for category in categories) else Real

    def code(value: Any) -> float:
        if value is None or value != value:
            return _NAN
        if not isinstance(value, wanted) or isinstance(value, bool) != is_flag:
            raise _wrong_type(spec, value)
        return codes.get(value, _NAN)

    return code


def _wrong_type(spec: InputSpec, value: Any) -> InvalidRequest:
    wanted = spec.dtype if spec.categories is None else f"a category of type {spec.dtype}"
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
    return InvalidRequest(f"Input '{spec.name}' must be {wanted} or null, got {shown}.")


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
    if np.any(np.abs(numbers) > _LARGEST):
        raise InvalidRequest(f"Input '{spec.name}' is beyond what a float32 can hold ({_LARGEST:.3g}).")
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
