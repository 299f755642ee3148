"""Messages of a topic to rows of the feature table, by the same transform and checks as everywhere.

No message stops a stream: one that is no JSON object, lacks a key or makes the transform fail is its own bad row, found
by halving the batch where the whole of it cannot be prepared. What is no row at all lies in quarantine as
`{"message": text}`, which no replay takes for one. Rules for whole batches do not apply: where a batch ends is chance.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa

from cluster.errors import InvalidRequest, SourceError
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.pushed_rows import (
    AT_ONCE,
    POSITION,
    CheckedRows,
    instants,
    parted,
    typed_column,
)
from feature_jobs.store.ingestion.validation import SOURCE, prepare_part
from feature_jobs.store.types.key_types import reason_against

NO_VALUE = "the message has no value; to delete, send an object whose `deleted` field is true"
"""Kafka's own tombstone says neither when an entity ceased nor, by itself, which."""
_NO_ROWS = pa.table({POSITION: pa.array([], pa.int64())})


def check_messages(
    messages: Sequence[bytes | None],
    view: FeatureView,
    *,
    key_types: Mapping[str, str],
    now: dt.datetime,
    ahead: Ahead = AT_ONCE,
) -> CheckedRows:
    """Transform and check messages; `POSITION` is the place among them.

    Args:
        messages: their values.
        view: its source names the fields of a message.
        key_types: how its keys are stored; of the batch's first message where nothing is yet. Declared types count
            before them.
        now: the moment of ingestion.
        ahead: how far times may lie ahead of it.
    """
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    wrong: list[tuple[int, str]] = []
    types = {**key_types, **view.key_types}
    for place, message in enumerate(messages):
        row = _parsed(message, view, types)
        if isinstance(row, str):
            wrong.append((place, row))
        else:
            rows.append(row)
            places.append(place)
    parts = list(_checked(rows, places, view, now, ahead)) if rows else []
    raw = [_text(messages[place]) for place, _ in wrong]
    unread = pa.table(
        {
            POSITION: pa.array([place for place, _ in wrong], pa.int64()),
            "reason": pa.array([reason for _, reason in wrong], pa.string()),
            "raw": pa.array(raw, pa.string()),
        }
    )
    good = [part.good for part in parts if part.good.num_rows] or [_NO_ROWS]
    return CheckedRows(
        good=pa.concat_tables(good, promote_options="permissive"),
        bad=pa.concat_tables([*(part.bad for part in parts), unread]).sort_by(POSITION),
    )


def _parsed(message: bytes | None, view: FeatureView, types: dict[str, str]) -> dict[str, Any] | str:
    """A message's row, or why it is none; the first one's keys say of which type keys are, where nothing else does."""
    if message is None:
        return NO_VALUE
    try:
        row = orjson.loads(message)
    except orjson.JSONDecodeError:
        return "the message is no JSON"
    if not isinstance(row, dict):
        return "the message is no JSON object"
    if (reason := reason_against(row, view.join_keys, types)) is not None:
        return reason
    source = view.source
    times = [name for name in (source.event_timestamp, source.created_timestamp) if name in row]
    return row | {name: _time(row[name]) for name in times}


def _checked(
    rows: list[dict[str, Any]], places: list[int], view: FeatureView, now: dt.datetime, ahead: Ahead
) -> Iterator[CheckedRows]:
    """The rows in as few parts as can be prepared."""
    reasons: dict[int, str] = {}
    try:
        prepared = prepare_part(pa.table(_columns(rows, view, reasons)), view, now=now, ahead=ahead)
    except (SourceError, InvalidRequest) as error:
        if len(rows) > 1:
            half = len(rows) // 2
            yield from _checked(rows[:half], places[:half], view, now, ahead)
            yield from _checked(rows[half:], places[half:], view, now, ahead)
            return
        bad = {
            POSITION: pa.array(places, pa.int64()),
            "reason": [str(error)],
            "raw": [orjson.dumps(rows[0]).decode()],
        }
        yield CheckedRows(good=_NO_ROWS, bad=pa.table(bad))
        return
    kept = [name for name in prepared.column_names if name != SOURCE]
    yield parted(prepared.select(kept), rows, reasons, places=places)


def _columns(rows: list[dict[str, Any]], view: FeatureView, reasons: dict[int, str]) -> dict[str, pa.Array]:
    source = view.source
    dtypes = {field.name: field.dtype for field in view.schema} if view.transform is None else {}
    times = [name for name in (source.event_timestamp, source.created_timestamp) if name is not None]
    names = (
        {name: None for row in rows for name in row} if view.transform is not None else dict.fromkeys(dtypes)
    )
    columns = {key: pa.array([row[key] for row in rows]) for key in view.join_keys}
    for name in names:
        if name not in columns and name not in (*times, source.deleted):
            values = [row.get(name) for row in rows]
            columns[name] = typed_column(name, values, dtypes.get(name), reasons, zone=source.zone)
    for name in times:
        columns[name] = instants(
            name, [row.get(name) for row in rows], reasons, zone=source.zone, kind="timestamp"
        )
    if source.deleted is not None:
        columns[source.deleted] = typed_column(
            source.deleted, [row.get(source.deleted) for row in rows], "bool", reasons
        )
    return columns


def _time(value: Any) -> Any:
    """Text of an instant, from milliseconds too."""
    if type(value) is int:
        try:
            return (dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=value)).isoformat()
        except OverflowError:
            return str(value)
    return value


def _text(message: bytes | None) -> str:
    return json.dumps({"message": (message or b"").decode(errors="replace")})
