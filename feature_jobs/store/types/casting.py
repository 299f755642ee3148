"""Lossless casts of source columns to their declared types. A cast that would change a value raises SchemaMismatch."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch
from feature_jobs.store.types.instants import TIME, Rounding, column_to_utc, start_of_days, to_micros

_UNITS_PER_DAY = {"s": 86_400, "ms": 86_400 * 10**3, "us": 86_400 * 10**6, "ns": 86_400 * 10**9}
DECLARED_KEYS = {"int64": pa.int64(), "string": pa.string()}
_FIRST_TIME, _LAST_TIME = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def cast_feature(column: pa.ChunkedArray, target: pa.DataType, *, name: str) -> pa.ChunkedArray:
    """Cast a column to `target` without changing a value.

    NaN becomes null. A dictionary-encoded column is decoded first.

    Raises:
        SchemaMismatch: The types do not fit, or a value would change.
    """
    was_dictionary = pa.types.is_dictionary(column.type)
    plain = column.cast(column.type.value_type) if was_dictionary else column
    if pa.types.is_list(target):
        return _cast_list(plain, target, name=name)
    if pa.types.is_floating(plain.type):
        plain = pc.if_else(pc.is_nan(plain), pa.scalar(None, plain.type), plain)
    if target == TIME:
        return _within_years(cast_time(plain, name=name, rounding=Rounding.exact), name, column.type)
    if pa.types.is_date32(target):
        return _cast_date(plain, name=name)
    if plain.type == target:
        return _utf8(plain, name)
    if pa.types.is_decimal(target) and pa.types.is_integer(plain.type):
        # Arrow does not cast int64 to a decimal with too few digits for every int64.
        plain = plain.cast(pa.decimal128(38, 0))
    if not _fits(plain.type, target, was_dictionary=was_dictionary):
        raise _mismatch(name, target, column.type)
    try:
        result = _utf8(plain, name).cast(target)
    except pa.ArrowInvalid as error:
        # This message goes into the ledger. Arrow's message quotes the value, so it must not be used.
        raise _mismatch(name, target, column.type, reason="a value would change") from error
    narrowed = pa.types.is_floating(plain.type) and pa.types.is_floating(target)
    if narrowed and not pc.all(pc.equal(result.cast(plain.type), plain), min_count=0).as_py():
        raise _mismatch(name, target, column.type, reason="values would be rounded")
    return result


def cast_key(column: pa.ChunkedArray, *, name: str, dtype: str | None = None) -> pa.ChunkedArray:
    """Cast a join key to int64 or string.

    Args:
        column: The source column.
        name: The key's name, for messages.
        dtype: The declared type. None accepts both types.

    Raises:
        SchemaMismatch: The column contains neither integers nor strings, or not the declared type.
    """
    plain = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    if dtype is not None and pa.types.is_null(plain.type):
        return plain.cast(DECLARED_KEYS[dtype])
    if pa.types.is_integer(plain.type) and dtype in (None, "int64"):
        return cast_feature(plain, pa.int64(), name=name)
    if is_text(plain.type) and dtype in (None, "string"):
        return _utf8(plain, name).cast(pa.string())
    if pa.types.is_null(plain.type) and len(plain) == 0:
        return plain.cast(pa.string())
    requirement = "must be integers or strings" if dtype is None else f"is declared as {dtype}"
    raise SchemaMismatch(f"Join key '{name}' {requirement}, the source has {column.type}.")


def _cast_list(column: pa.ChunkedArray, target: pa.DataType, *, name: str) -> pa.ChunkedArray:
    """Cast lists of any Arrow list type, element by element. A NaN element becomes a null element.

    Raises:
        SchemaMismatch: The column does not contain lists, or an element does not fit.
    """
    if pa.types.is_null(column.type):
        return column.cast(target)
    if not (_is_list(column.type) and _is_scalar(column.type.value_type)):
        raise _mismatch(name, target, column.type)
    chunks = []
    for chunk in column.chunks:
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).cast(pa.int64())
        elements = pa.chunked_array([pc.list_flatten(chunk)])
        try:
            values = cast_feature(elements, target.value_type, name=name).combine_chunks()
        except SchemaMismatch as error:
            raise SchemaMismatch(f"{error} The types are those of the list elements.") from error
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths.to_numpy())]), pa.int32())
        chunks.append(pa.ListArray.from_arrays(offsets, values, type=target, mask=chunk.is_null()))
    return pa.chunked_array(chunks, target)


def list_faults(column: pa.ChunkedArray, length: int | None) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Yield each possible fault of a list column, with a non-null mask of the rows that have it.

    Args:
        column: Lists.
        length: The declared number of elements. None allows any.
    """
    if length is not None:
        wrong_length = pc.fill_null(pc.not_equal(pc.list_value_length(column), length), False)
        yield f"has not {length} elements", wrong_length
    parents, elements = pc.list_parent_indices(column), pc.list_flatten(column)
    with_null = np.zeros(len(column), dtype=bool)
    if elements.null_count:
        with_null[parents.filter(pc.is_null(elements)).to_numpy()] = True
    yield "has a null element", pa.chunked_array([pa.array(with_null)])


def cast_time(column: pa.ChunkedArray, *, name: str, rounding: Rounding) -> pa.ChunkedArray:
    """Cast timestamps or dates to UTC microseconds. A time without a zone is taken as UTC.

    Times of sources that declare a zone were converted to UTC before. A time outside the range of microseconds becomes
    the first or last time in that range, hundreds of thousands of years away.

    Args:
        column: Timestamps or dates.
        name: The column's name, for messages.
        rounding: How to round times that are finer than microseconds.

    Raises:
        SchemaMismatch: The column contains neither timestamps nor dates, or `rounding` is exact and a time is finer
            than microseconds.
    """
    actual = column.type
    if pa.types.is_date(actual):
        column = start_of_days(column)
    if pa.types.is_null(actual):
        column = column.cast(TIME)
    if not pa.types.is_timestamp(column.type):
        raise _mismatch(name, TIME, actual)
    try:
        return column_to_utc(to_micros(column, rounding), None)
    except pa.ArrowInvalid as error:
        reason = "a time is finer than microseconds; round it in the source"
        raise _mismatch(name, TIME, actual, reason=reason) from error


def _cast_date(column: pa.ChunkedArray, *, name: str) -> pa.ChunkedArray:
    """Cast to dates. Times at midnight UTC are accepted, because pandas has no date type."""
    if pa.types.is_null(column.type):
        return column.cast(pa.date32())
    if not (pa.types.is_date(column.type) or pa.types.is_timestamp(column.type)):
        raise _mismatch(name, pa.date32(), column.type)
    dates = column.cast(pa.date32())
    if pa.types.is_timestamp(column.type):
        days_since_epoch = pc.cast(dates, pa.int32()).cast(pa.int64())
        midnights = pc.multiply(days_since_epoch, _UNITS_PER_DAY[column.type.unit])
        if not pc.all(pc.equal(midnights, column.cast(pa.int64())), min_count=0).as_py():
            raise _mismatch(name, pa.date32(), column.type, reason="a time is not midnight in UTC")
    first, last = pa.scalar(date.min, pa.date32()), pa.scalar(date.max, pa.date32())
    if pc.any(pc.or_(pc.less(dates, first), pc.greater(dates, last)), min_count=0).as_py():
        raise _mismatch(name, pa.date32(), column.type, reason="a date is not within the years 1 to 9999")
    return dates


def is_utf8(column: pa.ChunkedArray) -> bool:
    """Return whether text is valid UTF-8. Files of other writers may not be."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _utf8(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    if is_text(column.type) and not is_utf8(column):
        raise SchemaMismatch(
            f"Column '{name}' holds text that is not UTF-8. Write the source again in UTF-8."
        )
    return column


def _within_years(column: pa.ChunkedArray, name: str, actual: pa.DataType) -> pa.ChunkedArray:
    too_early, too_late = (
        pc.less(column, pa.scalar(_FIRST_TIME, TIME)),
        pc.greater(column, pa.scalar(_LAST_TIME, TIME)),
    )
    if pc.any(pc.or_(too_early, too_late), min_count=0).as_py():
        raise _mismatch(name, TIME, actual, reason="a time is not within the years 1 to 9999")
    return column


def _fits(actual: pa.DataType, target: pa.DataType, *, was_dictionary: bool) -> bool:
    """Return whether a lossless cast between the two types is possible at all."""
    if pa.types.is_null(actual):
        return True
    numbers = pa.types.is_integer(actual) or pa.types.is_floating(actual)
    if pa.types.is_integer(target) or pa.types.is_floating(target):
        return numbers or (was_dictionary and is_text(actual) and pa.types.is_integer(target))
    if pa.types.is_decimal(target):
        return bool(pa.types.is_decimal(actual))
    if pa.types.is_binary(target):
        return _is_binary(actual)
    return bool(pa.types.is_string(target) and is_text(actual))


def _is_list(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype)
    )


def _is_scalar(dtype: pa.DataType) -> bool:
    return not pa.types.is_nested(dtype)


def _is_binary(dtype: pa.DataType) -> bool:
    kinds = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_binary_view,
    )
    return any(kind(dtype) for kind in kinds)


def is_text(dtype: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's string types."""
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)
    )


def _mismatch(
    name: str, expected: pa.DataType, actual: pa.DataType, *, reason: str | None = None
) -> SchemaMismatch:
    tail = f" ({reason})" if reason else ""
    return SchemaMismatch(f"Column '{name}' should be {expected}, the source has {actual}{tail}.")


def same_type(stored: pa.DataType, new: pa.DataType) -> bool:
    """Return whether values of a type can be added to a stored column. All types of text are treated as equal."""
    return stored == new or (is_text(stored) and is_text(new))
