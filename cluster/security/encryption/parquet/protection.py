"""The key of each column of a table, and the column statistics that may be readable without a key."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch

MAX_STATISTIC_CHARS = 32
_SEPARATORS = ",;:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Protection:
    """The key of each column of a table, as plain data that can be sent to workers."""

    default: str
    """Key of the footer's signature and of every column that `keys` does not name."""
    keys: tuple[tuple[str, str | None], ...] = ()
    """Pairs of column and key. The key is None for a public column."""

    def key_of(self, column: str) -> str | None:
        """Return the key of one column. For several columns, use `keys_of`."""
        return self.keys_of([column])[column]

    def keys_of(self, columns: Iterable[str]) -> dict[str, str | None]:
        """Return the key of each column."""
        key_by_column = dict(self.keys)
        return {column: key_by_column.get(column, self.default) for column in columns}

    def may_be_plain(self, columns: Iterable[str]) -> bool:
        """Return whether a file with these columns may be unencrypted, because no column of the table is protected."""
        key_by_column = dict(self.keys)
        return all(column in key_by_column for column in columns) and not any(key_by_column.values())

    def by_key(self, columns: list[str]) -> dict[str, list[str]]:
        """Return the protected columns of each key.

        Raises:
            SchemaMismatch: the name of a protected column cannot be written. Arrow gets the columns as one text,
                separated by `, ; :`, and would encrypt the wrong column.
        """
        grouped: dict[str, list[str]] = {}
        counts, keys = Counter(columns), self.keys_of(columns)
        for column in columns:
            key = keys[column]
            if key is None:
                continue
            if not column or column != column.strip() or any(mark in column for mark in _SEPARATORS):
                raise SchemaMismatch(
                    f"Protected column {column!r} cannot be written: its name is empty, begins or ends with a space, "
                    f"or has one of {' '.join(_SEPARATORS)} in it. Rename it."
                )
            if counts[column] > 1:
                raise SchemaMismatch(f"Two columns are called {column!r}. Rename one.")
            grouped.setdefault(key, []).append(column)
        return grouped


def public_statistics(table: pa.Table, protection: Protection) -> str:
    """Return the `stats` of a file for the Delta log: row count, and statistics of public columns only.

    The statistics are minima, maxima and null counts. Minimum and maximum are optional, and left out if the log cannot
    state them exactly: for text of more than 32 characters, floats with NaN, and nested or other types.
    """
    minima: dict[str, Any] = {}
    maxima: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    for name, key in protection.keys_of(table.column_names).items():
        column = table[name]
        if key is not None or pa.types.is_nested(column.type):
            continue
        nulls[name] = column.null_count
        if (bounds := _bounds(column)) is not None:
            minima[name], maxima[name] = bounds
    return json.dumps(
        {"numRecords": table.num_rows, "minValues": minima, "maxValues": maxima, "nullCount": nulls},
        allow_nan=False,
    )


def _bounds(column: pa.ChunkedArray) -> tuple[Any, Any] | None:
    dtype = column.type
    is_text = pa.types.is_string(dtype) or pa.types.is_large_string(dtype)
    is_time = dtype == pa.timestamp("us", "UTC") or pa.types.is_date32(dtype)
    is_float = pa.types.is_float64(dtype)
    if column.null_count == len(column) or not (is_text or is_time or is_float or pa.types.is_integer(dtype)):
        return None
    if is_text and pc.max(pc.utf8_length(column)).as_py() > MAX_STATISTIC_CHARS:
        return None
    if is_float and pc.any(pc.is_nan(column)).as_py():
        return None
    bounds = pc.min_max(column).as_py()
    if is_float and not all(map(math.isfinite, bounds.values())):
        return None
    return _as_json(bounds["min"]), _as_json(bounds["max"])


def _as_json(value: Any) -> Any:
    match value:
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        case date():
            return value.isoformat()
        case _:
            return value
