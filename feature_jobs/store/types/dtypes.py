"""The dtypes of features: their names, their Arrow types, and how their values look as JSON and in the online store.

Scalars are named alone. `decimal(12, 2)` has 12 digits, 2 of them after the point. `list<float32>` is a list of any
length, `list<float32, 384>` one of exactly 384 elements; a list is whole or null, its elements are never null.

| dtype | JSON | online store |
|---|---|---|
| bool, int32, int64, float32, float64, string | as they are | the same |
| timestamp | ISO 8601 text in UTC, `2026-01-31T12:00:00.5Z` | microseconds since 1970 |
| date | ISO 8601 text, `2026-01-31` | days since 1970 |
| decimal(p, s) | text with all decimal places, `"12.50"`; taken is text or a whole number | the same text |
| bytes | base64 text (RFC 4648, section 4) | bytes |
| list<…> | an array of its elements | of numbers a NumPy array, of text a list |

What one gives as JSON, the other takes unchanged: a push, a training set's default, an input of a request.
"""

from __future__ import annotations

import base64
import datetime as dt
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any

import numpy as np
import pyarrow as pa

from feature_jobs.store.types.instants import Rounding, parse

MAX_LIST = 65_536
"""Elements of a list with a declared length."""
MAX_DIGITS = 38
ELEMENT = "element"
"""What Parquet and Delta call a list's elements."""
INTEGERS, FLOATS = frozenset({"int32", "int64"}), frozenset({"float32", "float64"})
NUMBERS = INTEGERS | FLOATS
_SCALARS: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "timestamp": pa.timestamp("us", "UTC"),
    "date": pa.date32(),
    "bytes": pa.binary(),
}
_ELEMENTS = frozenset({"bool", "string"} | NUMBERS)
_EXAMPLES = ("decimal(12, 2)", "list<float32>", "list<float32, 384>")
_LIST = re.compile(r"list<\s*(\w+)\s*(?:,\s*(\d{1,9})\s*)?>")
_DECIMAL = re.compile(r"decimal\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)")
_DECIMAL_TEXT = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_DATE_TEXT = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_LARGEST = float(np.finfo(np.float32).max)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
_FIRST_DAY = dt.date(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class ListOf:
    """A dtype of lists."""

    element: str
    length: int | None
    """None is any."""

    @property
    def is_numeric(self) -> bool:
        """Whether the elements are of one width, numbers or bools."""
        return self.element != "string"


@dataclass(frozen=True, slots=True)
class DecimalOf:
    """A dtype of decimals."""

    digits: int
    scale: int


class _Dtypes(Mapping[str, pa.DataType]):
    """Dtype to Arrow type; decimals and lists are looked up like the others."""

    def __getitem__(self, dtype: str) -> pa.DataType:
        return _arrow(dtype)

    def __iter__(self) -> Iterator[str]:
        """Names to show; of decimals and lists an example each."""
        return iter([*_SCALARS, *_EXAMPLES])

    def __len__(self) -> int:
        return len(_SCALARS) + len(_EXAMPLES)


DTYPES: Mapping[str, pa.DataType] = _Dtypes()
"""Every dtype with its Arrow type."""


def spelled(dtype: str) -> str:
    """A known dtype in its one spelling: `list<float32,4>` is `list<float32, 4>`.

    Raises:
        KeyError: it is unknown.
    """
    if (one := list_of(dtype)) is not None:
        _arrow(dtype)
        return f"list<{one.element}>" if one.length is None else f"list<{one.element}, {one.length}>"
    if (number := decimal_of(dtype)) is not None:
        _arrow(dtype)
        return f"decimal({number.digits}, {number.scale})"
    return dtype if dtype in _SCALARS else _unknown(dtype)


@functools.cache
def list_of(dtype: str) -> ListOf | None:
    """The elements of a list; None for any other dtype."""
    found = _LIST.fullmatch(dtype)
    return None if found is None else ListOf(found[1], None if found[2] is None else int(found[2]))


@functools.cache
def decimal_of(dtype: str) -> DecimalOf | None:
    """The digits of a decimal; None for any other dtype."""
    found = _DECIMAL.fullmatch(dtype)
    return None if found is None else DecimalOf(int(found[1]), int(found[2]))


def is_rich(dtype: str) -> bool:
    """Whether a dtype is a date, bytes, a decimal or a list: one that no model takes as a single number or category."""
    return dtype in ("date", "bytes") or decimal_of(dtype) is not None or list_of(dtype) is not None


@functools.cache
def _arrow(dtype: str) -> pa.DataType:
    if dtype in _SCALARS:
        return _SCALARS[dtype]
    if (one := list_of(dtype)) is not None:
        if one.element not in _ELEMENTS or (one.length is not None and not 1 <= one.length <= MAX_LIST):
            return _unknown(dtype)
        return pa.list_(pa.field(ELEMENT, _SCALARS[one.element]))
    number = decimal_of(dtype)
    if number is None or not (1 <= number.digits <= MAX_DIGITS and 0 <= number.scale <= number.digits):
        return _unknown(dtype)
    return pa.decimal128(number.digits, number.scale)


def _unknown(dtype: str) -> Any:
    raise KeyError(dtype)


def from_json(value: Any, dtype: str) -> Any:
    """A JSON value as Arrow takes it for a dtype.

    Raises:
        ValueError: it is none of that dtype. The message does not say the value.
    """
    if (one := list_of(dtype)) is not None:
        return _list(value, one)
    if (number := decimal_of(dtype)) is not None:
        return _decimal(value, number)
    converted = _scalar(value, dtype)
    if converted is None:
        raise ValueError(f"it is no {dtype}")
    return converted


def _scalar(value: Any, dtype: str) -> Any:
    """None where the value does not fit."""
    kind = type(value)
    match dtype:
        case "timestamp":
            return parse(value, None, Rounding.exact)
        case "date":
            return _date(value) if kind is str else None
        case "bytes":
            return base64.b64decode(value, validate=True) if kind is str else None
        case "float64" | "float32":
            return _float(value, dtype) if kind in (int, float) else None
        case "int64" | "int32":
            bits = int(dtype[3:]) - 1
            return value if kind is int and -(1 << bits) <= value < 1 << bits else None
        case "bool":
            return value if kind is bool else None
        case _:
            return value if kind is str else None


def _float(value: Any, dtype: str) -> float | None:
    """A fraction is rounded to the dtype, as every number that was written with decimals; a whole number is not."""
    try:
        number = float(value)
    except OverflowError:
        return None
    if dtype == "float32" and not (abs(number) <= _LARGEST or math.isinf(number) or math.isnan(number)):
        return None
    rounded = float(np.float32(number)) if dtype == "float32" else number
    return number if isinstance(value, float) or rounded == value else None


def _date(text: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(text) if _DATE_TEXT.fullmatch(text) else None
    except ValueError:
        return None


def _decimal(value: Any, wanted: DecimalOf) -> Decimal:
    """Exactly, or not at all; a float is none, because what was written before it was rounded is lost."""
    is_text = isinstance(value, str) and _DECIMAL_TEXT.fullmatch(value) is not None
    if not is_text and (isinstance(value, bool) or not isinstance(value, int | Decimal)):
        raise ValueError("a decimal is text or a whole number")
    number = Decimal(value)
    if not number.is_finite():  # a database has NaN
        raise ValueError("it is no finite number")
    exact = Context(prec=wanted.digits, traps=[Inexact, InvalidOperation])
    try:
        return number.quantize(Decimal(1).scaleb(-wanted.scale), context=exact)
    except (Inexact, InvalidOperation) as error:
        raise ValueError(f"it does not fit {wanted.digits} digits, {wanted.scale} after the point") from error


def _list(value: Any, wanted: ListOf) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("it is no list")
    if wanted.length is not None and len(value) != wanted.length:
        raise ValueError(f"it has {len(value)} elements, not {wanted.length}")
    if wanted.element in FLOATS and set(map(type, value)) == {float} and sum(map(abs, value)) <= _LARGEST:
        return value  # the common case at once: a NaN, an infinity or a number too large would be in the sum
    found = [_scalar(one, wanted.element) for one in value]
    if any(one is None or one != one for one in found):
        raise ValueError(f"an element is no {wanted.element}")
    return found


def to_json(values: Sequence[Any], dtype: str) -> Sequence[Any]:
    """Values of the online store as JSON; arrays of NumPy stay, the writer of the answer knows them."""
    match dtype:
        case "timestamp":
            return [None if one is None else _instant_text(one) for one in values]
        case "date":
            return [
                None if one is None else (_FIRST_DAY + dt.timedelta(days=one)).isoformat() for one in values
            ]
        case "bytes":
            return [None if one is None else base64.b64encode(one).decode() for one in values]
        case _:
            return values


def _instant_text(microseconds: int) -> str:
    return (_EPOCH + microseconds * _MICROSECOND).isoformat().replace("+00:00", "Z")


def online_values(column: pa.ChunkedArray, dtype: str) -> list[Any]:
    """A column as the online store has it."""
    if dtype == "timestamp":
        return list(column.cast(pa.int64()).to_pylist())
    if dtype == "date":
        return list(column.cast(pa.int32()).to_pylist())
    if decimal_of(dtype) is not None:
        return [None if one is None else format(one, "f") for one in column.to_pylist()]
    return list(column.to_pylist())


def online_value(value: Any, dtype: str) -> Any:
    """One JSON value as the online store has it.

    Raises:
        ValueError: it is none of that dtype.
    """
    return online_values(pa.chunked_array([pa.array([from_json(value, dtype)], DTYPES[dtype])]), dtype)[0]


def arrow_values(values: Sequence[Any], dtype: str) -> pa.Array:
    """Values as the online store, or JSON, has them, as Arrow.

    Raises:
        ValueError: one is of another dtype; pyarrow's own errors are of that kind.
    """
    target = DTYPES[dtype]
    if dtype in ("timestamp", "date", "bytes"):
        values = [from_json(one, dtype) if isinstance(one, str) else one for one in values]
        if dtype != "bytes" and all(one is None or isinstance(one, int) for one in values):
            return pa.array(values, pa.int64() if dtype == "timestamp" else pa.int32()).cast(target)
        return pa.array([_moment(one, dtype) for one in values], target)
    if (number := decimal_of(dtype)) is not None:
        return pa.array([None if one is None else _decimal(one, number) for one in values], target)
    return pa.array(values, target)


def _moment(value: Any, dtype: str) -> Any:
    if not isinstance(value, int):
        return value
    return _EPOCH + value * _MICROSECOND if dtype == "timestamp" else _FIRST_DAY + dt.timedelta(days=value)


@functools.cache
def packed_element(dtype: str) -> np.dtype[Any] | None:
    """How elements of a list lie one behind the other; None for text, and for what is no list."""
    one = list_of(dtype)
    if one is None or not one.is_numeric:
        return None
    return np.dtype("?" if one.element == "bool" else f"<{one.element[0]}{int(one.element[-2:]) // 8}")
