"""Bringing a source column to its declared type without losing anything, or refusing it by name."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch
from feature_jobs.store.instants import TIME, Rounding, days, in_zone, micros

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
        return _within_years(cast_time(plain, name=name, rounding=Rounding.exact), name, column.type)
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


def cast_key(column: pa.ChunkedArray, *, name: str) -> pa.ChunkedArray:
    """A join key as int64 or string.

    Raises:
        SchemaMismatch: it is neither integers nor strings.
    """
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    if pa.types.is_integer(plain.type):
        return cast_feature(plain, pa.int64(), name=name)
    if _is_string(plain.type):
        return _utf8(plain, name).cast(pa.string())
    if pa.types.is_null(plain.type) and len(plain) == 0:
        return plain.cast(pa.string())
    raise SchemaMismatch(f"Join key '{name}' must be integers or strings, the source has {column.type}.")


def cast_time(column: pa.ChunkedArray, *, name: str, rounding: Rounding) -> pa.ChunkedArray:
    """A time as UTC microseconds; without a zone it is UTC (`instants.zoned` is for sources with another one).

    A time that microseconds cannot reach becomes the last or first that they can, hundreds of thousands of years away.

    Args:
        column: timestamps or dates.
        name: of the column, for messages.
        rounding: of times that are finer than microseconds.

    Raises:
        SchemaMismatch: it is no timestamp or date, or would be rounded though it must be exact.
    """
    actual = column.type
    if pa.types.is_date(actual):
        column = days(column)
    if pa.types.is_null(actual):
        column = column.cast(TIME)
    if not pa.types.is_timestamp(column.type):
        raise _mismatch(name, TIME, actual)
    try:
        return in_zone(micros(column, rounding), None)
    except pa.ArrowInvalid as error:
        reason = "a time is finer than microseconds; round it where it is written"
        raise _mismatch(name, TIME, actual, reason=reason) from error


def is_utf8(column: pa.ChunkedArray) -> bool:
    """Whether text is what it should be; files of other writers need not be."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _utf8(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    if _is_string(column.type) and not is_utf8(column):
        raise SchemaMismatch(f"Column '{name}' holds text that is not UTF-8. Write the source anew.")
    return column


def _within_years(column: pa.ChunkedArray, name: str, actual: pa.DataType) -> pa.ChunkedArray:
    beyond = pc.or_(pc.less(column, pa.scalar(_FIRST, TIME)), pc.greater(column, pa.scalar(_LAST, TIME)))
    if pc.any(beyond, min_count=0).as_py():
        raise _mismatch(name, TIME, actual, reason="a time is not within the years 1 to 9999")
    return column


def _fits(actual: pa.DataType, target: pa.DataType, *, was_dictionary: bool) -> bool:
    """Whether a cast between the kinds can be lossless at all."""
    if pa.types.is_null(actual):
        return True
    numbers = pa.types.is_integer(actual) or pa.types.is_floating(actual)
    if pa.types.is_integer(target) or pa.types.is_floating(target):
        return numbers or (was_dictionary and _is_string(actual) and pa.types.is_integer(target))
    return bool(pa.types.is_string(target) and _is_string(actual))


def _is_string(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)
    )


def _mismatch(
    name: str, expected: pa.DataType, actual: pa.DataType, *, reason: str | None = None
) -> SchemaMismatch:
    tail = f" ({reason})" if reason else ""
    return SchemaMismatch(f"Column '{name}' should be {expected}, the source has {actual}{tail}.")
