"""Dtypes of features: names, Arrow types, JSON values and values in the online store.

A scalar dtype is one word. `decimal(12, 2)` has 12 digits, 2 of them after the decimal point. `list<float32>` is a list
of any length, `list<float32, 384>` a list of exactly 384 elements. A list may be null; its elements may not.

| dtype | JSON | online store |
|---|---|---|
| bool, int32, int64, float32, float64, string | as they are | the same |
| timestamp | ISO 8601 text in UTC, `2026-01-31T12:00:00.5Z` | microseconds since 1970 |
| date | ISO 8601 text, `2026-01-31` | days since 1970 |
| decimal(p, s) | text with all decimal places, `"12.50"`; input may also be a whole number | the same text |
| bytes | base64 text (RFC 4648, section 4) | bytes |
| list<…> | an array of its elements | NumPy array of numbers, Python list of text |

All parts of the platform use the same JSON form: pushes, defaults for missing values, and inputs of requests.
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

from feature_jobs.store.types.instants import Rounding, parse_instant

MAX_LIST = 65_536
"""Maximum declared length of a list."""
MAX_DIGITS = 38
ELEMENT = "element"
"""Field name of list elements in Parquet and Delta."""
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
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
_FIRST_DAY = dt.date(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list dtype."""

    element: str
    length: int | None
    """Number of elements. None allows any."""

    @property
    def is_numeric(self) -> bool:
        """Whether the elements are numbers or bools, so that all have the same width in bytes."""
        return self.element != "string"


@dataclass(frozen=True, slots=True)
class DecimalOf:
    """A decimal dtype."""

    digits: int
    scale: int


class _Dtypes(Mapping[str, pa.DataType]):
    """Mapping of dtype to Arrow type. It also accepts every valid decimal and list dtype as a key."""

    def __getitem__(self, dtype: str) -> pa.DataType:
        return _arrow(dtype)

    def __iter__(self) -> Iterator[str]:
        """Yield names for messages: all scalars, and examples of decimals and lists."""
        return iter([*_SCALARS, *_EXAMPLES])

    def __len__(self) -> int:
        return len(_SCALARS) + len(_EXAMPLES)


DTYPES: Mapping[str, pa.DataType] = _Dtypes()
"""Every dtype with its Arrow type."""


def canonical_dtype(dtype: str) -> str:
    """Return a dtype in its canonical spelling: `list<float32,4>` becomes `list<float32, 4>`.

    Raises:
        KeyError: The dtype is unknown.
    """
    _arrow(dtype)
    if (list_type := list_of(dtype)) is not None:
        length = "" if list_type.length is None else f", {list_type.length}"
        return f"list<{list_type.element}{length}>"
    if (decimal_type := decimal_of(dtype)) is not None:
        return f"decimal({decimal_type.digits}, {decimal_type.scale})"
    return dtype


@functools.cache
def list_of(dtype: str) -> ListOf | None:
    """Parse a list dtype. Return None for any other dtype."""
    match = _LIST.fullmatch(dtype)
    return None if match is None else ListOf(match[1], None if match[2] is None else int(match[2]))


@functools.cache
def decimal_of(dtype: str) -> DecimalOf | None:
    """Parse a decimal dtype. Return None for any other dtype."""
    match = _DECIMAL.fullmatch(dtype)
    return None if match is None else DecimalOf(int(match[1]), int(match[2]))


def is_rich(dtype: str) -> bool:
    """Return whether a dtype is a date, bytes, a decimal or a list.

    A model cannot use such a value as one number or one category.
    """
    return dtype in ("date", "bytes") or decimal_of(dtype) is not None or list_of(dtype) is not None


@functools.cache
def _arrow(dtype: str) -> pa.DataType:
    if dtype in _SCALARS:
        return _SCALARS[dtype]
    if (list_type := list_of(dtype)) is not None:
        length_fits = list_type.length is None or 1 <= list_type.length <= MAX_LIST
        if list_type.element not in _ELEMENTS or not length_fits:
            raise KeyError(dtype)
        return pa.list_(pa.field(ELEMENT, _SCALARS[list_type.element]))
    decimal_type = decimal_of(dtype)
    if decimal_type is None:
        raise KeyError(dtype)
    digits, scale = decimal_type.digits, decimal_type.scale
    if not (1 <= digits <= MAX_DIGITS and 0 <= scale <= digits):
        raise KeyError(dtype)
    return pa.decimal128(digits, scale)


def from_json(value: Any, dtype: str) -> Any:
    """Convert a JSON value to the Python value that Arrow accepts for a dtype.

    Raises:
        ValueError: The value does not fit the dtype. The message does not contain the value.
    """
    if (list_type := list_of(dtype)) is not None:
        return _list(value, list_type)
    if (decimal_type := decimal_of(dtype)) is not None:
        return _decimal(value, decimal_type)
    converted = _scalar(value, dtype)
    if converted is None:
        raise ValueError(f"it is not a valid {dtype}")
    return converted


def _scalar(value: Any, dtype: str) -> Any:
    """Convert a JSON value to a scalar dtype. Return None if it does not fit."""
    kind = type(value)
    match dtype:
        case "timestamp":
            return parse_instant(value, None, Rounding.exact)
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
    """Convert a number to a float dtype. Return None if it does not fit.

    A number with decimals may be rounded. A whole number must be exact.
    """
    try:
        number = float(value)
    except OverflowError:
        return None
    if dtype == "float32" and not (abs(number) <= _MAX_FLOAT32 or math.isinf(number) or math.isnan(number)):
        return None
    rounded = float(np.float32(number)) if dtype == "float32" else number
    return number if isinstance(value, float) or rounded == value else None


def _date(text: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(text) if _DATE_TEXT.fullmatch(text) else None
    except ValueError:
        return None


def _decimal(value: Any, decimal_type: DecimalOf) -> Decimal:
    """Convert text or a whole number to a decimal, exactly.

    A float is refused: it was rounded already, so the original decimal is lost.

    Raises:
        ValueError: The value does not fit.
    """
    is_text = isinstance(value, str) and _DECIMAL_TEXT.fullmatch(value) is not None
    if not is_text and (isinstance(value, bool) or not isinstance(value, int | Decimal)):
        raise ValueError("a decimal is text or a whole number")
    number = Decimal(value)
    if not number.is_finite():  # NaN can come from a database
        raise ValueError("it is not a finite number")
    digits, scale = decimal_type.digits, decimal_type.scale
    exact = Context(prec=digits, traps=[Inexact, InvalidOperation])
    try:
        return number.quantize(Decimal(1).scaleb(-scale), context=exact)
    except (Inexact, InvalidOperation) as error:
        raise ValueError(f"it does not fit {digits} digits, {scale} after the point") from error


def _list(value: Any, list_type: ListOf) -> list[Any]:
    """Convert the elements of a JSON list.

    Raises:
        ValueError: The value is not a list, has the wrong length, or an element is null or does not fit.
    """
    if not isinstance(value, list):
        raise ValueError("it is not a list")
    if list_type.length is not None and len(value) != list_type.length:
        raise ValueError(f"it has {len(value)} elements, not {list_type.length}")
    if (
        list_type.element in FLOATS
        and set(map(type, value)) == {float}
        and sum(map(abs, value)) <= _MAX_FLOAT32
    ):
        # The common case, checked fast: a NaN, an infinity or a too large number would make the sum too large or NaN.
        return value
    elements = [_scalar(element, list_type.element) for element in value]
    if any(element is None or element != element for element in elements):
        raise ValueError(f"an element is not a valid {list_type.element}")
    return elements


def to_json(values: Sequence[Any], dtype: str) -> Sequence[Any]:
    """Convert values of the online store to JSON values. NumPy arrays stay: the response writer encodes them."""
    match dtype:
        case "timestamp":
            return [None if value is None else _instant_text(value) for value in values]
        case "date":
            return [
                None if value is None else (_FIRST_DAY + dt.timedelta(days=value)).isoformat()
                for value in values
            ]
        case "bytes":
            return [None if value is None else base64.b64encode(value).decode() for value in values]
        case _:
            return values


def _instant_text(microseconds: int) -> str:
    return (_EPOCH + microseconds * _MICROSECOND).isoformat().replace("+00:00", "Z")


def online_values(column: pa.ChunkedArray, dtype: str) -> list[Any]:
    """Convert a column to the values that the online store contains."""
    if dtype == "timestamp":
        return list(column.cast(pa.int64()).to_pylist())
    if dtype == "date":
        return list(column.cast(pa.int32()).to_pylist())
    if decimal_of(dtype) is not None:
        return [None if value is None else format(value, "f") for value in column.to_pylist()]
    return list(column.to_pylist())


def online_value(value: Any, dtype: str) -> Any:
    """Convert one JSON value to the value that the online store contains.

    Raises:
        ValueError: The value does not fit the dtype.
    """
    return online_values(pa.chunked_array([pa.array([from_json(value, dtype)], DTYPES[dtype])]), dtype)[0]


def to_arrow(values: Sequence[Any], dtype: str) -> pa.Array:
    """Convert values of the online store, or JSON values, to an Arrow array.

    Raises:
        ValueError: A value does not fit the dtype. Errors of pyarrow are ValueErrors too.
    """
    target = DTYPES[dtype]
    if dtype in ("timestamp", "date", "bytes"):
        values = [from_json(value, dtype) if isinstance(value, str) else value for value in values]
        if dtype != "bytes" and all(value is None or isinstance(value, int) for value in values):
            return pa.array(values, pa.int64() if dtype == "timestamp" else pa.int32()).cast(target)
        return pa.array([_python_time(value, dtype) for value in values], target)
    if (decimal_type := decimal_of(dtype)) is not None:
        return pa.array(
            [None if value is None else _decimal(value, decimal_type) for value in values], target
        )
    return pa.array(values, target)


def _python_time(value: Any, dtype: str) -> Any:
    """Convert microseconds or days since 1970 to a datetime or date. Return any other value unchanged."""
    if not isinstance(value, int):
        return value
    return _EPOCH + value * _MICROSECOND if dtype == "timestamp" else _FIRST_DAY + dt.timedelta(days=value)


@functools.cache
def packed_element_dtype(dtype: str) -> np.dtype[Any] | None:
    """Return the NumPy dtype in which a list's elements are packed. Return None for lists of text and other dtypes."""
    list_type = list_of(dtype)
    if list_type is None or not list_type.is_numeric:
        return None
    element = list_type.element
    return np.dtype("?" if element == "bool" else f"<{element[0]}{int(element[-2:]) // 8}")
