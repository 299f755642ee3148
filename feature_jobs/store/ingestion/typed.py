"""From text, and from values of JSON and SQL, to the types that a view declares: without any loss, or not at all.

No message says a value, because messages stand in the ledger.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.types.casting import cast_feature
from feature_jobs.store.types.columns import with_replaced
from feature_jobs.store.types.dtypes import DTYPES, from_json, is_rich, list_of
from feature_jobs.store.types.instants import FINER_TEXT, TIME, Rounding, in_zone, instant

_ZONED = r"[T ]\d{2}:.*(Z|[+-]\d{2}(:?\d{2})?)$"
_LONG = {"float32": r"^[+-]?\d{8,}$", "float64": r"^[+-]?\d{16,}$"}
"""Whole numbers that may have more digits than the type."""
_INTEGER = r"^(0|-?[1-9]\d*)$"
_DIGITS = r"^[+-]?\d+$"
_INFINITE = r"(?i)^[+-]?inf"
_LIKE = {
    "bool": "true, false, 1 or 0",
    "int32": "whole numbers",
    "int64": "whole numbers",
    "float32": "numbers with a decimal point, that 32 bits hold exactly where they are whole",
    "float64": "numbers with a decimal point, that 64 bits hold exactly where they are whole",
    "timestamp": "ISO 8601, as 2024-01-31T12:00:00Z, no finer than microseconds",
    "date": "ISO 8601, as 2024-01-31",
    "bytes": "base64",
    "decimal": "decimals as text or whole numbers, with no more digits than declared",
    "list": "JSON arrays without nulls",
}


@dataclass(frozen=True, slots=True)
class Roles:
    """What columns are for, where it decides how they are read."""

    zone: str | None = None
    """Of times without one."""
    instants: frozenset[str] = frozenset()
    """Event and created times, which are rounded up; all other times are exact."""
    keys: frozenset[str] = frozenset()
    """Join keys: a whole number stands there in one spelling only, since `007` is another key than `7`."""

    @classmethod
    def of(cls, view: FeatureView) -> Roles:
        """Of a view's source."""
        times = (view.source.event_timestamp, view.source.created_timestamp)
        return cls(view.source.zone, frozenset(name for name in times if name), frozenset(view.join_keys))

    def rounding(self, name: str) -> Rounding:
        """Of a time column."""
        return Rounding.up if name in self.instants else Rounding.exact


_PLAIN = Roles()


def zoneless(first: pa.Table, roles: Roles) -> list[str]:
    """The event and created times that have no zone, by some first rows; empty where the source declares one."""
    found = []
    for name in first.column_names if roles.zone is None else ():
        column = first[name].drop_null()
        if name not in roles.instants or not len(column):
            continue
        if pa.types.is_string(column.type):
            bare = not pc.all(pc.match_substring_regex(column, _ZONED)).as_py()
        else:
            bare = pa.types.is_date(column.type) or getattr(column.type, "tz", "") is None
        found += [name] if bare else []
    return found


def column_types(view: FeatureView, head: pa.Table, known: Mapping[str, str]) -> dict[str, str]:
    """The dtype of each column that is not text, decided once for a batch.

    Args:
        view: fields, keys, times and `columns` of its source.
        head: first rows, as they came.
        known: key to "int64" or "string", as the feature table has them. Declared types count before them; where
            there are neither, the first rows decide.
    """
    source = view.source
    types = {field.name: field.dtype for field in view.schema}
    held = {**known, **view.key_types}
    types |= {key: held.get(key) or _key_type(head, key) for key in view.join_keys}
    types |= {name: "timestamp" for name in (source.event_timestamp, source.created_timestamp) if name}
    types |= {source.deleted: "bool"} if source.deleted else {}
    return types | dict(source.columns)


def declared(view: FeatureView) -> set[str]:
    """The columns that a view names: its own, and those that its source gives a dtype."""
    source = view.source
    times = {source.event_timestamp, source.created_timestamp, source.deleted} - {None}
    return {*view.join_keys, *(field.name for field in view.schema), *map(str, times), *source.columns}


def typed_text(block: pa.Table, types: Mapping[str, str], roles: Roles = _PLAIN) -> pa.Table:
    """A block of text columns, nulls apart, with the declared ones as their types.

    Raises:
        SchemaMismatch: naming the column and how many values do not fit.
    """
    columns = zip(block.column_names, block.columns, strict=True)
    return with_replaced(
        block,
        {
            name: text_column(column, types[name], name=name, roles=roles)
            for name, column in columns
            if name in types
        },
    )


def typed_rows(
    rows: Sequence[Mapping[str, Any]],
    types: Mapping[str, str],
    names: Iterable[str] = (),
    roles: Roles = _PLAIN,
) -> pa.Table:
    """Rows of plain values as a table: declared columns as their types, all others as text.

    Args:
        rows: what a row lacks is null.
        types: of declared columns.
        names: columns to begin with, whether these rows have them or not.
        roles: of columns.

    Raises:
        SchemaMismatch: naming the column.
    """
    found = dict.fromkeys([*names, *(name for row in rows for name in row)])
    return pa.table(
        {
            name: value_column(
                [row.get(name) for row in rows], types.get(name, "text"), name=name, roles=roles
            )
            for name in found
        }
    )


def text_column(column: pa.ChunkedArray, dtype: str, *, name: str, roles: Roles = _PLAIN) -> pa.ChunkedArray:
    """Text as a type.

    Raises:
        SchemaMismatch: some values are no such thing, or would change.
    """
    if dtype == "string":
        return column
    if is_rich(dtype):
        return _rich_column(column.to_pylist(), dtype, name=name)
    try:
        return _parsed(column, dtype, name, roles)
    except pa.ArrowInvalid:  # which quotes the value
        bad = sum(not _fits(value, dtype, name, roles) for value in column.drop_null())
        raise _misfits(name, dtype, bad, len(column)) from None


def value_column(values: list[Any], dtype: str, *, name: str, roles: Roles = _PLAIN) -> pa.ChunkedArray:
    """Values as a type; `text` is text as it is, and anything else as JSON.

    Raises:
        SchemaMismatch: some values are of another type, or would change.
    """
    if dtype == "text":
        return pa.chunked_array([pa.array([_as_text(value) for value in values], pa.string())])
    if is_rich(dtype):
        return _rich_column(values, dtype, name=name)
    try:
        if dtype == "timestamp" and any(isinstance(value, dt.date) for value in values):
            return pa.chunked_array([pa.array([_moment(value, roles.zone) for value in values], TIME)])
        column = pa.chunked_array([pa.array(values)])
        return _cast_values(column, dtype, name=name, roles=roles)
    except SchemaMismatch:
        raise
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise SchemaMismatch(
            f"Column '{name}' should be {dtype}; its values are of several types."
        ) from error


def _rich_column(values: Sequence[Any], dtype: str, *, name: str) -> pa.ChunkedArray:
    """Dates, bytes, decimals and lists, from text or from a database's own values; whether a list has the declared
    length is a row's own matter and judged later."""
    any_length = dtype if (one := list_of(dtype)) is None else f"list<{one.element}>"
    found, bad = [], 0
    for value in values:
        try:
            found.append(None if value is None else _rich_value(value, any_length))
        except ValueError:
            bad += 1
    if bad:
        raise _misfits(name, dtype, bad, len(values))
    return pa.chunked_array([pa.array(found, DTYPES[dtype])])


def _rich_value(value: Any, dtype: str) -> Any:
    match value:
        case str() if list_of(dtype) is not None:
            return from_json(orjson.loads(value), dtype)
        case bytes() | bytearray() | memoryview() if dtype == "bytes":
            return bytes(value)
        case dt.date() if dtype == "date" and type(value) is dt.date:
            return value
        case _:
            return from_json(value, dtype)


def _misfits(name: str, dtype: str, bad: int, values: int) -> SchemaMismatch:
    return SchemaMismatch(
        f"Column '{name}' should be {dtype}; {bad} of {values} values in one block are not. "
        f"Write {_LIKE[re.split('[<(]', dtype)[0]]}, and leave nulls empty (or name them with `nulls`)."
    )


def _cast_values(column: pa.ChunkedArray, dtype: str, *, name: str, roles: Roles) -> pa.ChunkedArray:
    target, given = DTYPES[dtype], column.type
    if pa.types.is_null(given):
        return column.cast(target)
    if dtype == "timestamp" and pa.types.is_string(given):
        return text_column(column, dtype, name=name, roles=roles)
    if pa.types.is_decimal(given) and dtype in ("float32", "float64"):
        if not all(_held(value, dtype) for value in column.drop_null().to_pylist()):
            raise pa.ArrowInvalid("a whole number would change")
        return column.cast(target)
    if pa.types.is_decimal(given):
        column = column.cast(pa.int64())
    if dtype == "bool" and pa.types.is_integer(given):  # as SQLite has it
        if not pc.all(pc.is_in(column, pa.array([0, 1], given)), min_count=0).as_py():
            raise pa.ArrowInvalid("neither 0 nor 1")
        return column.cast(target)
    return cast_feature(column, target, name=name)


def _parsed(column: pa.ChunkedArray, dtype: str, name: str, roles: Roles) -> pa.ChunkedArray:
    if dtype == "timestamp":
        return _times(column, roles.rounding(name), roles.zone)
    if dtype in ("int32", "int64"):
        _require(column, _INTEGER if name in roles.keys else _DIGITS)
    parsed = column.cast(DTYPES[dtype])
    if dtype in _LONG:
        whole = column.filter(pc.match_substring_regex(column, _LONG[dtype]))
        pc.replace_substring_regex(whole, r"^\+", "").cast(pa.int64()).cast(
            DTYPES[dtype]
        )  # raises if inexact
        _require(column.filter(pc.is_inf(parsed)), _INFINITE)  # else a number was too large
    return parsed


def _require(column: pa.ChunkedArray, pattern: str) -> None:
    if not pc.all(pc.match_substring_regex(column, pattern), min_count=0).as_py():
        raise pa.ArrowInvalid("text of another form")


def _times(column: pa.ChunkedArray, rounding: Rounding, zone: str | None) -> pa.ChunkedArray:
    """By the rules of `instants`."""
    finer = pc.match_substring_regex(column, FINER_TEXT)
    if rounding is Rounding.exact and pc.any(finer, min_count=0).as_py():
        raise pa.ArrowInvalid("a time is finer than microseconds")
    column = pc.replace_substring_regex(column, r"(\.\d{6})\d+", r"\1")
    zoned, nothing = pc.match_substring_regex(column, _ZONED), pa.scalar(None, pa.string())
    with_zone = pc.if_else(zoned, column, nothing).cast(TIME)
    without = in_zone(pc.if_else(zoned, nothing, column).cast(pa.timestamp("us")), zone)
    more = pc.multiply(finer.cast(pa.int64()), pa.scalar(1)).cast(pa.duration("us"))
    return pc.add(pc.coalesce(with_zone, without), more)


def _moment(value: Any, zone: str | None) -> dt.datetime | None:
    """A database's time or date as UTC."""
    if value is None or isinstance(value, dt.datetime):
        return None if value is None else instant(value, zone)
    if isinstance(value, dt.date):
        return instant(dt.datetime.combine(value, dt.time()), zone)
    raise TypeError("neither a time nor a date")


def _held(value: Decimal, dtype: str) -> bool:
    """Whether a type has a whole number exactly, and does not make another one infinite."""
    number = float(np.float32(value)) if dtype == "float32" else float(value)
    return math.isfinite(number) and (value != value.to_integral_value() or Decimal(number) == value)


def _fits(value: pa.Scalar, dtype: str, name: str, roles: Roles) -> bool:
    try:
        _parsed(pa.chunked_array([pa.array([value.as_py()], pa.string())]), dtype, name, roles)
    except pa.ArrowInvalid:
        return False
    return True


def _key_type(head: pa.Table, key: str) -> str:
    """Whole numbers where all of the first rows are written as such; `007` is text."""
    if key not in head.column_names:
        return "string"
    column = head[key].drop_null()
    if pa.types.is_integer(column.type):
        return "int64"
    if not pa.types.is_string(column.type) or len(column) == 0:
        return "string"
    return "int64" if pc.all(pc.match_substring_regex(column, _INTEGER)).as_py() else "string"


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value, default=str).decode()
