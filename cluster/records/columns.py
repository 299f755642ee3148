"""Conversion of records to rows of a table and back, without loss.

Inputs and their types differ between versions of a model, and a label can be a number or a text. Separate columns for
inputs and labels would conflict, and each version would add columns. So inputs and labels are stored as JSON. The same
schema serves all models, and never changes. Parts of a record that fit no column are stored in `other`: for example, a
field of a later release, or a time that cannot be parsed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import pyarrow as pa

TIME = pa.timestamp("us", "UTC")
SEGMENT, LINE, OTHER = "segment", "line", "other"
"""Segment and line together identify a record. They are not encrypted, so that no key is needed to identify rows."""

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
    """Return the schema of a log's table; `log` is `predictions` or `outcomes`."""
    position = [pa.field(SEGMENT, pa.string()), pa.field(LINE, pa.int64())]
    columns = [pa.field(name, _TYPES[kind]) for name, kind in _SCHEMAS[log].items()]
    return pa.schema([*position, *columns, pa.field(OTHER, pa.string())])


def to_row(log: str, segment: str, line: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record to a row of the table."""
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
    """Convert a row of the table back to its record."""
    record = {
        name: _TO_VALUE[kind](row[name]) for name, kind in _SCHEMAS[log].items() if row.get(name) is not None
    }
    return record | (orjson.loads(row[OTHER]) if row.get(OTHER) is not None else {})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return value if is_integer and -(2**63) <= value < 2**63 else None


def _time(value: Any) -> dt.datetime | None:
    try:
        time = dt.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return time if time.utcoffset() == dt.timedelta(0) else None


_TO_COLUMN: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "integer": _integer,
    "time": _time,
    "json": lambda value: orjson.dumps(value).decode(),
}
_TO_VALUE: dict[str, Callable[[Any], Any]] = {
    "text": str,
    "integer": int,
    "time": dt.datetime.isoformat,
    "json": orjson.loads,
}
