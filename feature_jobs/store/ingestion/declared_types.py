"""Convert text, and values of JSON and SQL, to the types that a view declares. A value that would change is refused.

No error message contains a value, because messages are stored in the ledger.
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
from feature_jobs.store.types.columns import replace_columns
from feature_jobs.store.types.dtypes import DTYPES, from_json, is_rich, list_of
from feature_jobs.store.types.instants import FINER_TEXT, TIME, Rounding, column_to_utc, utc_instant

_ZONED = r"[T ]\d{2}:.*(Z|[+-]\d{2}(:?\d{2})?)$"
_LONG = {"float32": r"^[+-]?\d{8,}$", "float64": r"^[+-]?\d{16,}$"}
"""Patterns of whole numbers that may have more digits than the dtype can represent."""
_INTEGER = r"^(0|-?[1-9]\d*)$"
_DIGITS = r"^[+-]?\d+$"
_INFINITE = r"(?i)^[+-]?inf"
_EXPECTED_FORM = {
    "bool": "true, false, 1 or 0",
    "int32": "whole numbers",
    "int64": "whole numbers",
    "float32": "numbers with a decimal point; whole numbers only if 32 bits hold them exactly",
    "float64": "numbers with a decimal point; whole numbers only if 64 bits hold them exactly",
    "timestamp": "ISO 8601, as 2024-01-31T12:00:00Z, no finer than microseconds",
    "date": "ISO 8601, as 2024-01-31",
    "bytes": "base64",
    "decimal": "decimals as text or whole numbers, with no more digits than declared",
    "list": "JSON arrays without nulls",
}


@dataclass(frozen=True, slots=True)
class Roles:
    """Roles of a source's columns. A role decides how the values are parsed."""

    zone: str | None = None
    """Time zone of times that have none."""
    instants: frozenset[str] = frozenset()
    """Columns of event and created times, which are rounded up. All other times must be exact."""
    keys: frozenset[str] = frozenset()
    """Join keys. A whole number has only one valid spelling there, because `007` and `7` are different keys."""

    @classmethod
    def of(cls, view: FeatureView) -> Roles:
        """Return the roles of the columns of a view's source."""
        times = (view.source.event_timestamp, view.source.created_timestamp)
        return cls(view.source.zone, frozenset(name for name in times if name), frozenset(view.join_keys))

    def rounding(self, name: str) -> Rounding:
        """Return how a time column is rounded."""
        return Rounding.up if name in self.instants else Rounding.exact


_NO_ROLES = Roles()


def find_zoneless(first: pa.Table, roles: Roles) -> list[str]:
    """Return the columns of event and created times that have no time zone in the first rows.

    The list is empty if the source declares a time zone.
    """
    zoneless = []
    for name in first.column_names if roles.zone is None else ():
        column = first[name].drop_null()
        if name not in roles.instants or not len(column):
            continue
        if pa.types.is_string(column.type):
            has_no_zone = not pc.all(pc.match_substring_regex(column, _ZONED)).as_py()
        else:
            has_no_zone = pa.types.is_date(column.type) or getattr(column.type, "tz", "") is None
        if has_no_zone:
            zoneless.append(name)
    return zoneless


def column_types(view: FeatureView, head: pa.Table, key_types: Mapping[str, str]) -> dict[str, str]:
    """Return the dtype of each column that is not text, decided once for a batch.

    Args:
        view: its fields, keys, times and source `columns` have declared types.
        head: the first rows as they were read.
        key_types: stored key types of the feature table ("int64" or "string"). Declared types have priority. For a key
            without either, the first rows decide.
    """
    source = view.source
    types = {field.name: field.dtype for field in view.schema}
    all_key_types = {**key_types, **view.key_types}
    types |= {key: all_key_types.get(key) or _derive_key_type(head, key) for key in view.join_keys}
    types |= {name: "timestamp" for name in (source.event_timestamp, source.created_timestamp) if name}
    types |= {source.deleted: "bool"} if source.deleted else {}
    return types | dict(source.columns)


def declared_columns(view: FeatureView) -> set[str]:
    """Return the columns that a view names: its own columns, and the columns whose dtype its source declares."""
    source = view.source
    times = {source.event_timestamp, source.created_timestamp, source.deleted} - {None}
    return {*view.join_keys, *(field.name for field in view.schema), *map(str, times), *source.columns}


def typed_text(block: pa.Table, types: Mapping[str, str], roles: Roles = _NO_ROLES) -> pa.Table:
    """Convert the declared columns of a block of text columns to their types.

    Raises:
        SchemaMismatch: values do not fit; the message contains the column and the number of such values.
    """
    columns = zip(block.column_names, block.columns, strict=True)
    return replace_columns(
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
    roles: Roles = _NO_ROLES,
) -> pa.Table:
    """Convert rows of plain values to a table. Declared columns get their types; all others become text.

    Args:
        rows: rows by column name; a missing value becomes null.
        types: dtypes of the declared columns.
        names: the first columns of the table, even if no row has them.
        roles: roles of the columns.

    Raises:
        SchemaMismatch: values do not fit; the message contains the column.
    """
    all_names = dict.fromkeys([*names, *(name for row in rows for name in row)])
    return pa.table(
        {
            name: value_column(
                [row.get(name) for row in rows], types.get(name, "text"), name=name, roles=roles
            )
            for name in all_names
        }
    )


def text_column(
    column: pa.ChunkedArray, dtype: str, *, name: str, roles: Roles = _NO_ROLES
) -> pa.ChunkedArray:
    """Convert a text column to a dtype.

    Raises:
        SchemaMismatch: values have another form, or would change.
    """
    if dtype == "string":
        return column
    if is_rich(dtype):
        return _rich_column(column.to_pylist(), dtype, name=name)
    try:
        return _parse(column, dtype, name, roles)
    except pa.ArrowInvalid:  # Arrow's message quotes the value
        num_bad = sum(not _can_parse(value, dtype, name, roles) for value in column.drop_null())
        raise _mismatch(name, dtype, num_bad, len(column)) from None


def value_column(values: list[Any], dtype: str, *, name: str, roles: Roles = _NO_ROLES) -> pa.ChunkedArray:
    """Convert Python values to a dtype. The pseudo-dtype `text` leaves text unchanged and writes other values as JSON.

    Raises:
        SchemaMismatch: values are of another type, or would change.
    """
    if dtype == "text":
        return pa.chunked_array([pa.array([_as_text(value) for value in values], pa.string())])
    if is_rich(dtype):
        return _rich_column(values, dtype, name=name)
    try:
        if dtype == "timestamp" and any(isinstance(value, dt.date) for value in values):
            return pa.chunked_array([pa.array([_utc_time(value, roles.zone) for value in values], TIME)])
        column = pa.chunked_array([pa.array(values)])
        return _cast_values(column, dtype, name=name, roles=roles)
    except SchemaMismatch:
        raise
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise SchemaMismatch(
            f"Column '{name}' should be {dtype}; its values are of several types."
        ) from error


def _rich_column(values: Sequence[Any], dtype: str, *, name: str) -> pa.ChunkedArray:
    """Convert text or a database's own values to dates, bytes, decimals or lists.

    A list of the wrong length is accepted, because the row checks find it later and reject only its row.
    """
    list_type = list_of(dtype)
    any_length = dtype if list_type is None else f"list<{list_type.element}>"
    converted, num_bad = [], 0
    for value in values:
        try:
            converted.append(None if value is None else _rich_value(value, any_length))
        except ValueError:
            num_bad += 1
    if num_bad:
        raise _mismatch(name, dtype, num_bad, len(values))
    return pa.chunked_array([pa.array(converted, DTYPES[dtype])])


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


def _mismatch(name: str, dtype: str, num_bad: int, num_values: int) -> SchemaMismatch:
    return SchemaMismatch(
        f"Column '{name}' should be {dtype}; {num_bad} of {num_values} values in one block are not. "
        f"Write {_EXPECTED_FORM[re.split('[<(]', dtype)[0]]}, and leave nulls empty (or name them with `nulls`)."
    )


def _cast_values(column: pa.ChunkedArray, dtype: str, *, name: str, roles: Roles) -> pa.ChunkedArray:
    target, actual = DTYPES[dtype], column.type
    if pa.types.is_null(actual):
        return column.cast(target)
    if dtype == "timestamp" and pa.types.is_string(actual):
        return text_column(column, dtype, name=name, roles=roles)
    if pa.types.is_decimal(actual) and dtype in ("float32", "float64"):
        if not all(_is_held_exactly(value, dtype) for value in column.drop_null().to_pylist()):
            raise pa.ArrowInvalid("a whole number would change")
        return column.cast(target)
    if pa.types.is_decimal(actual):
        column = column.cast(pa.int64())
    if dtype == "bool" and pa.types.is_integer(actual):  # SQLite stores bools as integers
        if not pc.all(pc.is_in(column, pa.array([0, 1], actual)), min_count=0).as_py():
            raise pa.ArrowInvalid("neither 0 nor 1")
        return column.cast(target)
    return cast_feature(column, target, name=name)


def _parse(column: pa.ChunkedArray, dtype: str, name: str, roles: Roles) -> pa.ChunkedArray:
    if dtype == "timestamp":
        return _parse_times(column, roles.rounding(name), roles.zone)
    if dtype in ("int32", "int64"):
        _require_pattern(column, _INTEGER if name in roles.keys else _DIGITS)
    parsed = column.cast(DTYPES[dtype])
    if dtype in _LONG:
        long_numbers = column.filter(pc.match_substring_regex(column, _LONG[dtype]))
        integers = pc.replace_substring_regex(long_numbers, r"^\+", "").cast(pa.int64())
        integers.cast(DTYPES[dtype])  # raises if a number is not exact
        # An infinity from any other text means that the number was too large.
        _require_pattern(column.filter(pc.is_inf(parsed)), _INFINITE)
    return parsed


def _require_pattern(column: pa.ChunkedArray, pattern: str) -> None:
    if not pc.all(pc.match_substring_regex(column, pattern), min_count=0).as_py():
        raise pa.ArrowInvalid("text of another form")


def _parse_times(column: pa.ChunkedArray, rounding: Rounding, zone: str | None) -> pa.ChunkedArray:
    """Parse times by the rules of `instants`."""
    finer = pc.match_substring_regex(column, FINER_TEXT)
    if rounding is Rounding.exact and pc.any(finer, min_count=0).as_py():
        raise pa.ArrowInvalid("a time is finer than microseconds")
    column = pc.replace_substring_regex(column, r"(\.\d{6})\d+", r"\1")
    zoned, null = pc.match_substring_regex(column, _ZONED), pa.scalar(None, pa.string())
    with_zone = pc.if_else(zoned, column, null).cast(TIME)
    without_zone = column_to_utc(pc.if_else(zoned, null, column).cast(pa.timestamp("us")), zone)
    round_up = pc.multiply(finer.cast(pa.int64()), pa.scalar(1)).cast(pa.duration("us"))
    return pc.add(pc.coalesce(with_zone, without_zone), round_up)


def _utc_time(value: Any, zone: str | None) -> dt.datetime | None:
    """Convert a database's time or date to UTC."""
    if value is None or isinstance(value, dt.datetime):
        return None if value is None else utc_instant(value, zone)
    if isinstance(value, dt.date):
        return utc_instant(dt.datetime.combine(value, dt.time()), zone)
    raise TypeError("neither a time nor a date")


def _is_held_exactly(value: Decimal, dtype: str) -> bool:
    """Return False if a float type would change a whole number, or make any number infinite."""
    number = float(np.float32(value)) if dtype == "float32" else float(value)
    return math.isfinite(number) and (value != value.to_integral_value() or Decimal(number) == value)


def _can_parse(value: pa.Scalar, dtype: str, name: str, roles: Roles) -> bool:
    try:
        _parse(pa.chunked_array([pa.array([value.as_py()], pa.string())]), dtype, name, roles)
    except pa.ArrowInvalid:
        return False
    return True


def _derive_key_type(head: pa.Table, key: str) -> str:
    """Return "int64" if all first rows contain whole numbers, else "string". `007` is text."""
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
