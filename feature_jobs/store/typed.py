"""From text, and from values of JSON and SQL, to the types that a view declares: without any loss, or not at all.

No message says a value, because messages stand in the ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch
from feature_jobs.store.casting import TIME, cast_feature
from feature_jobs.store.columns import with_replaced
from feature_jobs.store.definitions import FeatureView
from feature_jobs.store.sources import DTYPES

_ZONED = r"[T ]\d{2}:.*(Z|[+-]\d{2}(:?\d{2})?)$"
_WHOLE = r"^[+-]?\d{16,}$"
_INTEGER = r"^(0|-?[1-9]\d*)$"
_LIKE = {
    "bool": "true, false, 1 or 0",
    "int32": "whole numbers",
    "int64": "whole numbers",
    "float32": "numbers with a decimal point",
    "float64": "numbers with a decimal point, that 64 bits hold exactly where they are whole",
    "timestamp": "ISO 8601, as 2024-01-31T12:00:00Z",
}


def column_types(view: FeatureView, head: pa.Table, known: Mapping[str, str]) -> dict[str, str]:
    """The dtype of each column that is not text, decided once for a batch.

    Args:
        view: fields, keys, times and `columns` of its source.
        head: first rows, as they came.
        known: key to "int64" or "string", as the feature table has them; else the first rows decide.
    """
    source = view.source
    types = {field.name: field.dtype for field in view.schema}
    types |= {key: known.get(key) or _key_type(head, key) for key in view.join_keys}
    types |= {name: "timestamp" for name in (source.event_timestamp, source.created_timestamp) if name}
    types |= {source.deleted: "bool"} if source.deleted else {}
    return types | dict(source.columns)


def typed_text(block: pa.Table, types: Mapping[str, str]) -> pa.Table:
    """A block of text columns, nulls apart, with the declared ones as their types.

    Raises:
        SchemaMismatch: naming the column and how many values do not fit.
    """
    columns = zip(block.column_names, block.columns, strict=True)
    return with_replaced(
        block,
        {name: text_column(column, types[name], name=name) for name, column in columns if name in types},
    )


def typed_rows(
    rows: Sequence[Mapping[str, Any]], types: Mapping[str, str], names: Iterable[str] = ()
) -> pa.Table:
    """Rows of plain values as a table: declared columns as their types, all others as text.

    Args:
        rows: what a row lacks is null.
        types: of declared columns.
        names: columns to begin with, whether these rows have them or not.

    Raises:
        SchemaMismatch: naming the column.
    """
    found = dict.fromkeys([*names, *(name for row in rows for name in row)])
    return pa.table(
        {
            name: value_column([row.get(name) for row in rows], types.get(name, "text"), name=name)
            for name in found
        }
    )


def text_column(column: pa.ChunkedArray, dtype: str, *, name: str) -> pa.ChunkedArray:
    """Text as a type.

    Raises:
        SchemaMismatch: some values are no such thing, or would change.
    """
    if dtype == "string":
        return column
    try:
        return _parsed(column, dtype)
    except pa.ArrowInvalid:  # which quotes the value
        bad = sum(not _fits(value, dtype) for value in column.drop_null())
        raise SchemaMismatch(
            f"Column '{name}' should be {dtype}; {bad} of {len(column)} values in one block are not. "
            f"Write {_LIKE[dtype]}, and leave nulls empty (or name them with `nulls`)."
        ) from None


def value_column(values: list[Any], dtype: str, *, name: str) -> pa.ChunkedArray:
    """Values as a type; `text` is text as it is, and anything else as JSON.

    Raises:
        SchemaMismatch: some values are of another type, or would change.
    """
    if dtype == "text":
        return pa.chunked_array([pa.array([_as_text(value) for value in values], pa.string())])
    try:
        column = pa.chunked_array([pa.array(values)])
        return _cast_values(column, dtype, name=name)
    except SchemaMismatch:
        raise
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise SchemaMismatch(
            f"Column '{name}' should be {dtype}; its values are of several types."
        ) from error


def _cast_values(column: pa.ChunkedArray, dtype: str, *, name: str) -> pa.ChunkedArray:
    target, given = DTYPES[dtype], column.type
    if pa.types.is_null(given):
        return column.cast(target)
    if dtype == "timestamp" and pa.types.is_string(given):
        return text_column(column, dtype, name=name)
    if pa.types.is_decimal(given) and dtype in ("float32", "float64"):
        return column.cast(target)
    if pa.types.is_decimal(given):
        column = column.cast(pa.int64())
    if dtype == "bool" and pa.types.is_integer(given):  # as SQLite has it
        if not pc.all(pc.is_in(column, pa.array([0, 1], given)), min_count=0).as_py():
            raise pa.ArrowInvalid("neither 0 nor 1")
        return column.cast(target)
    return cast_feature(column, target, name=name)


def _parsed(column: pa.ChunkedArray, dtype: str) -> pa.ChunkedArray:
    if dtype == "timestamp":
        return _times(column)
    parsed = column.cast(DTYPES[dtype])
    if dtype in ("float32", "float64"):
        whole = column.filter(pc.match_substring_regex(column, _WHOLE))
        pc.replace_substring_regex(whole, r"^\+", "").cast(pa.int64()).cast(
            DTYPES[dtype]
        )  # raises if inexact
    return parsed


def _times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As everywhere: without a zone it is UTC, nanoseconds are cut off."""
    column = pc.replace_substring_regex(column, r"(\.\d{6})\d+", r"\1")
    zoned, nothing = pc.match_substring_regex(column, _ZONED), pa.scalar(None, pa.string())
    with_zone = pc.if_else(zoned, column, nothing).cast(TIME)
    without = pc.if_else(zoned, nothing, column).cast(pa.timestamp("us")).cast(TIME)
    return pc.coalesce(with_zone, without)


def _fits(value: pa.Scalar, dtype: str) -> bool:
    try:
        _parsed(pa.chunked_array([pa.array([value.as_py()], pa.string())]), dtype)
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
