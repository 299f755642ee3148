"""Which key each column of a table is under, and what may be said of a table without any key."""

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
    """Which key each column of a table is under, as plain data that any worker can be given."""

    default: str
    """Key of the footer's signature and of every column that is not named."""
    keys: tuple[tuple[str, str | None], ...] = ()
    """Column to its key; none for a public column, which needs no key."""

    def key_of(self, column: str) -> str | None:
        """The key of a column; for many, use `keys_of`."""
        return self.keys_of([column])[column]

    def keys_of(self, columns: Iterable[str]) -> dict[str, str | None]:
        """The key of each column."""
        named = dict(self.keys)
        return {column: named.get(column, self.default) for column in columns}

    def may_be_plain(self, columns: Iterable[str]) -> bool:
        """Whether a file of these columns may be an ordinary one: nothing of the table is protected."""
        named = dict(self.keys)
        return all(column in named for column in columns) and not any(named.values())

    def by_key(self, columns: list[str]) -> dict[str, list[str]]:
        """Each key's columns.

        Raises:
            SchemaMismatch: a protected column's name cannot be written. Arrow is told the columns in one text with
                `, ; :` between them, and would encrypt another column than the one that is meant.
        """
        found: dict[str, list[str]] = {}
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
            found.setdefault(key, []).append(column)
        return found


def public_statistics(table: pa.Table, protection: Protection) -> str:
    """A file's `stats` for the Delta log: its row count, and minima, maxima and null counts of public columns only.

    A column whose order the log could not state exactly (text of more than 32 characters, floats with NaN, nested or
    other types) is left out, which is always allowed.
    """
    least: dict[str, Any] = {}
    most: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    for name, key in protection.keys_of(table.column_names).items():
        column = table[name]
        if key is not None or pa.types.is_nested(column.type):
            continue
        nulls[name] = column.null_count
        if (bounds := _bounds(column)) is not None:
            least[name], most[name] = bounds
    return json.dumps(
        {"numRecords": table.num_rows, "minValues": least, "maxValues": most, "nullCount": nulls},
        allow_nan=False,
    )


def _bounds(column: pa.ChunkedArray) -> tuple[Any, Any] | None:
    kind = column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    times = kind == pa.timestamp("us", "UTC") or pa.types.is_date32(kind)
    floats = pa.types.is_float64(kind)
    if column.null_count == len(column) or not (text or times or floats or pa.types.is_integer(kind)):
        return None
    if text and pc.max(pc.utf8_length(column)).as_py() > MAX_STATISTIC_CHARS:
        return None
    if floats and pc.any(pc.is_nan(column)).as_py():
        return None
    found = pc.min_max(column).as_py()
    if floats and not all(map(math.isfinite, found.values())):
        return None
    return _spelled(found["min"]), _spelled(found["max"])


def _spelled(value: Any) -> Any:
    match value:
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        case date():
            return value.isoformat()
        case _:
            return value
