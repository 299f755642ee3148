"""Bringing a source column to its declared type without losing anything, or refusing it by name."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch
from feature_jobs.store.types.instants import TIME, Rounding, days, in_zone, micros

_PER_DAY = {"s": 86_400, "ms": 86_400 * 10**3, "us": 86_400 * 10**6, "ns": 86_400 * 10**9}
DECLARED_KEYS = {"int64": pa.int64(), "string": pa.string()}
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


def cast_feature(column: pa.ChunkedArray, target: pa.DataType, *, name: str) -> pa.ChunkedArray:
    """The column as `target`, when no value changes: NaN becomes null, a dictionary its values.

    Raises:
        SchemaMismatch: the types do not fit, or a value would change.
    """
    was_dictionary = pa.types.is_dictionary(column.type)
    plain = column.cast(column.type.value_type) if was_dictionary else column
    if pa.types.is_list(target):
        return cast_list(plain, target, name=name)
    if pa.types.is_floating(plain.type):
        plain = pc.if_else(pc.is_nan(plain), pa.scalar(None, plain.type), plain)
    if target == TIME:
        return _within_years(cast_time(plain, name=name, rounding=Rounding.exact), name, column.type)
    if pa.types.is_date32(target):
        return _cast_date(plain, name=name)
    if plain.type == target:
        return _utf8(plain, name)
    if pa.types.is_decimal(target) and pa.types.is_integer(plain.type):
        plain = plain.cast(
            pa.decimal128(38, 0)
        )  # Arrow casts no int64 to a decimal of fewer digits than all int64 have
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
    if pa.types.is_null(plain.type) and len(plain) == 0:
        return plain.cast(pa.string())
    wanted = "must be integers or strings" if dtype is None else f"is declared as {dtype}"
    raise SchemaMismatch(f"Join key '{name}' {wanted}, the source has {column.type}.")


def cast_list(column: pa.ChunkedArray, target: pa.DataType, *, name: str) -> pa.ChunkedArray:
    """Lists, of any kind that Arrow has, with their elements cast; a NaN among them is a null element.

    Raises:
        SchemaMismatch: they are no lists, or an element does not fit.
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
            raise SchemaMismatch(f"{error} These are the elements of its lists.") from error
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths.to_numpy())]), pa.int32())
        chunks.append(pa.ListArray.from_arrays(offsets, values, type=target, mask=chunk.is_null()))
    return pa.chunked_array(chunks, target)


def misfits(column: pa.ChunkedArray, length: int | None) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """What can be wrong with lists row by row, and a non-null bool a row that says where it is."""
    if length is not None:
        yield (
            f"has not {length} elements",
            pc.fill_null(pc.not_equal(pc.list_value_length(column), length), False),
        )
    parents, elements = pc.list_parent_indices(column), pc.list_flatten(column)
    with_null = np.zeros(len(column), dtype=bool)
    if elements.null_count:
        with_null[parents.filter(pc.is_null(elements)).to_numpy()] = True
    yield "has a null element", pa.chunked_array([pa.array(with_null)])


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


def _cast_date(column: pa.ChunkedArray, *, name: str) -> pa.ChunkedArray:
    """Dates, and times at midnight UTC: pandas has no dates of its own."""
    if pa.types.is_null(column.type):
        return column.cast(pa.date32())
    if not (pa.types.is_date(column.type) or pa.types.is_timestamp(column.type)):
        raise _mismatch(name, pa.date32(), column.type)
    dates = column.cast(pa.date32())
    if pa.types.is_timestamp(column.type):
        numbers = pc.cast(dates, pa.int32()).cast(pa.int64())
        back = pc.multiply(numbers, _PER_DAY[column.type.unit])
        if not pc.all(pc.equal(back, column.cast(pa.int64())), min_count=0).as_py():
            raise _mismatch(name, pa.date32(), column.type, reason="a time is not midnight in UTC")
    first, last = pa.scalar(date.min, pa.date32()), pa.scalar(date.max, pa.date32())
    if pc.any(pc.or_(pc.less(dates, first), pc.greater(dates, last)), min_count=0).as_py():
        raise _mismatch(name, pa.date32(), column.type, reason="a date is not within the years 1 to 9999")
    return dates


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


def _fits(actual: pa.DataType, target: pa.DataType, *, was_dictionary: bool) -> bool:
    """Whether a cast between the kinds can be lossless at all."""
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
    """Whether a column is text, in any encoding."""
    return bool(
        pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)
    )


def _mismatch(
    name: str, expected: pa.DataType, actual: pa.DataType, *, reason: str | None = None
) -> SchemaMismatch:
    tail = f" ({reason})" if reason else ""
    return SchemaMismatch(f"Column '{name}' should be {expected}, the source has {actual}{tail}.")
