"""Bringing a source column to its declared type without losing anything, or refusing it by name."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch

TIME = pa.timestamp("us", "UTC")


def cast_feature(column: pa.ChunkedArray, target: pa.DataType, *, name: str) -> pa.ChunkedArray:
    """The column as `target`, when no value changes: NaN becomes null, a dictionary its values.

    Raises:
        SchemaMismatch: the types do not fit, or a value would change.
    """
    was_dictionary = pa.types.is_dictionary(column.type)
    plain = column.cast(column.type.value_type) if was_dictionary else column
    if pa.types.is_floating(plain.type):
        plain = pc.if_else(pc.is_nan(plain), pa.scalar(None, plain.type), plain)
    if plain.type == target:
        return plain
    if target == TIME:
        return cast_time(plain, name=name)
    if not _fits(plain.type, target, was_dictionary=was_dictionary):
        raise _mismatch(name, target, column.type)
    try:
        result = plain.cast(target)
    except pa.ArrowInvalid as error:
        raise _mismatch(name, target, column.type, reason=str(error)) from error
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
        return plain.cast(pa.string())
    raise SchemaMismatch(f"Join key '{name}' must be integers or strings, the source has {column.type}.")


def cast_time(column: pa.ChunkedArray, *, name: str) -> pa.ChunkedArray:
    """A time as UTC microseconds: without a zone it is taken as UTC, nanoseconds are cut off.

    Raises:
        SchemaMismatch: it is no timestamp or date.
    """
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"))
    if not pa.types.is_timestamp(column.type):
        raise _mismatch(name, TIME, column.type)
    if column.type.unit == "ns":
        column = pc.floor_temporal(column, unit="microsecond")
    return column.cast(TIME, safe=False)


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
    tail = f" ({reason.splitlines()[0].rstrip('.')})" if reason else ""
    return SchemaMismatch(f"Column '{name}' should be {expected}, the source has {actual}{tail}.")
