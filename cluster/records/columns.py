"""Records as columns of a table, and back, so that nothing of a record is lost on the way.

Versions of a model have other inputs, of other types, and a label may be a number or a text. As columns of their own
they would clash sooner or later, and a table that grows a column with every version is nobody's friend; so what differs
between versions stays JSON, and the schema is the same for all models and for good. What a record has and no column is
for, a field of a later release say, or a moment that cannot be read, is kept in `other`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import pyarrow as pa

TIME = pa.timestamp("us", "UTC")
SEGMENT, LINE, OTHER = "segment", "line", "other"
"""Where a record stood: no two have the same place. They are public, so that rows can be told apart without a key."""

_SCHEMAS: dict[str, dict[str, str]] = {
    "predictions": {
        "prediction_id": "text",
        "request_id": "text",
        "time": "time",
        "model": "text",
        "version": "integer",
        "variant": "text",
        "rollout": "text",
        "arm": "text",
        "unit_hash": "text",
        "as_of": "time",
        "entities": "json",
        "features": "json",
        "predictions": "json",
        "given": "json",
        "defaulted": "json",
    },
    "outcomes": {
        "prediction_id": "text",
        "row": "integer",
        "outcome": "json",
        "observed_at": "time",
        "received_at": "time",
    },
}
_TYPES = {"text": pa.string(), "json": pa.string(), "integer": pa.int64(), "time": TIME}


def schema(log: str) -> pa.Schema:
    """Of a log's table: `predictions` or `outcomes`."""
    place = [pa.field(SEGMENT, pa.string()), pa.field(LINE, pa.int64())]
    columns = [pa.field(name, _TYPES[kind]) for name, kind in _SCHEMAS[log].items()]
    return pa.schema([*place, *columns, pa.field(OTHER, pa.string())])


def to_row(log: str, segment: str, line: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a row."""
    row: dict[str, Any] = {SEGMENT: segment, LINE: line}
    other = {}
    for name, value in record.items():
        kind = _SCHEMAS[log].get(name)
        column = None if kind is None else _TO_COLUMN[kind](value)
        if column is None:
            other[name] = value
        else:
            row[name] = column
    return row | ({OTHER: orjson.dumps(other).decode()} if other else {})


def to_record(log: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a row."""
    record = {
        name: _TO_VALUE[kind](row[name]) for name, kind in _SCHEMAS[log].items() if row.get(name) is not None
    }
    return record | (orjson.loads(row[OTHER]) if row.get(OTHER) is not None else {})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and -(2**63) <= value < 2**63 else None


def _moment(value: Any) -> dt.datetime | None:
    try:
        moment = dt.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment if moment.utcoffset() == dt.timedelta(0) else None


_TO_COLUMN: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "integer": _integer,
    "time": _moment,
    "json": lambda value: orjson.dumps(value).decode(),
}
_TO_VALUE: dict[str, Callable[[Any], Any]] = {
    "text": str,
    "integer": int,
    "time": dt.datetime.isoformat,
    "json": orjson.loads,
}
