"""Bringing a source column to its declared type without losing anything, or refusing it by name."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch

TIME = pa.timestamp("us", "UTC")
DECLARED_KEYS = {"int64": pa.int64(), "string": pa.string()}
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def cast_feature(column: pa.ChunkedArray, target: pa.DataType, *, name: str) -> pa.ChunkedArray:
    """The column as `target`, when no value changes: NaN becomes null, a dictionary its values.

    Raises:
        SchemaMismatch: the types do not fit, or a value would change.
    """
    was_dictionary = pa.types.is_dictionary(column.type)
    plain = column.cast(column.type.value_type) if was_dictionary else column
    if pa.types.is_floating(plain.type):
        plain = pc.if_else(pc.is_nan(plain), pa.scalar(None, plain.type), plain)
    if target == TIME:
        return _within_years(cast_time(plain, name=name), name, column.type)
    if plain.type == target:
        return _utf8(plain, name)
    if not _fits(plain.type, target, was_dictionary=was_dictionary):
        raise _mismatch(name, target, column.type)
    try:
        result = _utf8(plain, name).cast(target)
    except pa.ArrowInvalid as error:
        # Arrow's own words quote the value, and this message goes into the ledger.
        raise _mismatch(name, target, column.type, reason="a value would change") from error
    narrowed = pa.types.is_floating(plain.type) and pa.types.is_floating(target)
    if narrowed and not pc.all(pc.equal(result.cast(plain.type), plain), min_count=0).as_py():
        raise _mismatch(name, target, column.type, reason="values would be rounded")
    return result


def cast_key(column: pa.ChunkedArray, *, name: str, dtype: str | None = None) -> pa.ChunkedArray:
    """A join key as int64 or string.

    Args:
        column: of the source.
        name: of the key.
        dtype: the declared type; None takes either.

    Raises:
        SchemaMismatch: it is neither integers nor strings, or not of the declared type.
    """
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    if dtype is not None and pa.types.is_null(plain.type):
        return plain.cast(DECLARED_KEYS[dtype])
    if pa.types.is_integer(plain.type) and dtype in (None, "int64"):
        return cast_feature(plain, pa.int64(), name=name)
    if is_text(plain.type) and dtype in (None, "string"):
        return _utf8(plain, name).cast(pa.string())
    wanted = "must be integers or strings" if dtype is None else f"is declared as {dtype}"
    raise SchemaMismatch(f"Join key '{name}' {wanted}, the source has {column.type}.")


def cast_time(column: pa.ChunkedArray, *, name: str) -> pa.ChunkedArray:
    """A time as UTC microseconds: without a zone it is taken as UTC, nanoseconds are cut off.

    A time that microseconds cannot reach becomes the last or first that they can, hundreds of thousands of years away.

    Raises:
        SchemaMismatch: it is no timestamp or date.
    """
    if pa.types.is_date32(column.type):
        column = column.cast(pa.date64())
    if pa.types.is_date64(column.type):
        column = column.cast(pa.timestamp("ms"))
    if not pa.types.is_timestamp(column.type):
        raise _mismatch(name, TIME, column.type)
    if column.type.unit == "ns":
        column = pc.floor_temporal(column, unit="microsecond")
    elif column.type.unit != "us":
        column = _within_microseconds(column)
    return column.cast(TIME)


def is_utf8(column: pa.ChunkedArray) -> bool:
    """Whether text is what it should be; files of other writers need not be."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _utf8(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    if is_text(column.type) and not is_utf8(column):
        raise SchemaMismatch(f"Column '{name}' holds text that is not UTF-8. Write the source anew.")
    return column


def _within_years(column: pa.ChunkedArray, name: str, actual: pa.DataType) -> pa.ChunkedArray:
    beyond = pc.or_(pc.less(column, pa.scalar(_FIRST, TIME)), pc.greater(column, pa.scalar(_LAST, TIME)))
    if pc.any(beyond, min_count=0).as_py():
        raise _mismatch(name, TIME, actual, reason="a time is not within the years 1 to 9999")
    return column


def _within_microseconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind, factor = column.type, 10**6 if column.type.unit == "s" else 10**3
    numbers = column.cast(pa.int64())
    most = (2**63 - 1) // factor
    inside = pc.min_element_wise(
        pc.max_element_wise(numbers, -most, skip_nulls=False), most, skip_nulls=False
    )
    return inside.cast(kind)


def _fits(actual: pa.DataType, target: pa.DataType, *, was_dictionary: bool) -> bool:
    """Whether a cast between the kinds can be lossless at all."""
    if pa.types.is_null(actual):
        return True
    numbers = pa.types.is_integer(actual) or pa.types.is_floating(actual)
    if pa.types.is_integer(target) or pa.types.is_floating(target):
        return numbers or (was_dictionary and is_text(actual) and pa.types.is_integer(target))
    return bool(pa.types.is_string(target) and is_text(actual))


def is_text(dtype: pa.DataType) -> bool:
    """Whether a column is text, in any encoding."""
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)
    )


def _mismatch(
    name: str, expected: pa.DataType, actual: pa.DataType, *, reason: str | None = None
) -> SchemaMismatch:
    tail = f" ({reason})" if reason else ""
    return SchemaMismatch(f"Column '{name}' should be {expected}, the source has {actual}{tail}.")
