"""Turn Kafka messages into rows of the feature table, with the same transform and checks as for every other source.

No message stops a stream. A message that is not a JSON object, lacks a key or makes the transform fail becomes one bad
row. If a batch cannot be prepared as a whole, it is halved until the bad message is found. A message that is not a row
at all is quarantined as `{"message": text}`, which a replay never reads as a row. Rules for whole batches do not apply,
because a batch of messages ends at an arbitrary message.
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
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.pushed_rows import (
    ONLINE_FUTURE_LIMIT,
    POSITION,
    CheckedRows,
    bad_rows,
    parse_times,
    split_rows,
    typed_column,
)
from feature_jobs.store.ingestion.validation import SOURCE, prepare_part
from feature_jobs.store.types.key_types import key_fault

NO_VALUE = "the message has no value; to delete, send an object whose `deleted` field is true"
"""Reason for a message without a value. Kafka's own tombstone does not contain the time of the deletion, and its value
does not contain the entity's keys."""
_NO_ROWS = pa.table({POSITION: pa.array([], pa.int64())})


def check_messages(
    messages: Sequence[bytes | None],
    view: FeatureView,
    *,
    key_types: Mapping[str, str],
    now: dt.datetime,
    ahead: FutureLimit = ONLINE_FUTURE_LIMIT,
) -> CheckedRows:
    """Transform and check messages. `POSITION` is a row's index in `messages`.

    Args:
        messages: the messages' values.
        view: its source names the fields of a message.
        key_types: stored types of the view's keys. Declared types have priority. A key without either gets its type
            from the batch's first message.
        now: the time of ingestion.
        ahead: how far times may be ahead of `now`.
    """
    rows: list[dict[str, Any]] = []
    positions: list[int] = []
    unread_positions: list[int] = []
    unread_reasons: list[str] = []
    types = {**key_types, **view.key_types}
    for position, message in enumerate(messages):
        row = _parse(message, view, types)
        if isinstance(row, str):
            unread_positions.append(position)
            unread_reasons.append(row)
        else:
            rows.append(row)
            positions.append(position)
    parts = list(_check(rows, positions, view, now, ahead)) if rows else []
    unread = bad_rows(
        unread_positions,
        unread_reasons,
        [_quarantine_text(messages[position]) for position in unread_positions],
    )
    good = [part.good for part in parts if part.good.num_rows] or [_NO_ROWS]
    return CheckedRows(
        good=pa.concat_tables(good, promote_options="permissive"),
        bad=pa.concat_tables([*(part.bad for part in parts), unread]).sort_by(POSITION),
    )


def _parse(message: bytes | None, view: FeatureView, types: dict[str, str]) -> dict[str, Any] | str:
    """Return a message's row, or the reason why it has none. A key of unknown type gets the type of this message."""
    if message is None:
        return NO_VALUE
    try:
        row = orjson.loads(message)
    except orjson.JSONDecodeError:
        return "the message is no JSON"
    if not isinstance(row, dict):
        return "the message is no JSON object"
    if (reason := key_fault(row, view.join_keys, types)) is not None:
        return reason
    source = view.source
    times = [name for name in (source.event_timestamp, source.created_timestamp) if name in row]
    return row | {name: _time_text(row[name]) for name in times}


def _check(
    rows: list[dict[str, Any]], positions: list[int], view: FeatureView, now: dt.datetime, ahead: FutureLimit
) -> Iterator[CheckedRows]:
    """Yield the checked rows. If they cannot be prepared together, check each half separately."""
    reasons: dict[int, str] = {}
    try:
        prepared = prepare_part(pa.table(_columns(rows, view, reasons)), view, now=now, ahead=ahead)
    except (SourceError, InvalidRequest) as error:
        if len(rows) > 1:
            half = len(rows) // 2
            yield from _check(rows[:half], positions[:half], view, now, ahead)
            yield from _check(rows[half:], positions[half:], view, now, ahead)
            return
        bad = bad_rows(positions, [str(error)], [orjson.dumps(rows[0]).decode()])
        yield CheckedRows(good=_NO_ROWS, bad=bad)
        return
    names = [name for name in prepared.column_names if name != SOURCE]
    yield split_rows(prepared.select(names), rows, reasons, positions=positions)


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
        values = [row.get(name) for row in rows]
        columns[name] = parse_times(name, values, reasons, zone=source.zone, kind="timestamp")
    if source.deleted is not None:
        columns[source.deleted] = typed_column(
            source.deleted, [row.get(source.deleted) for row in rows], "bool", reasons
        )
    return columns


def _time_text(value: Any) -> Any:
    """Return a number of milliseconds since 1970 as ISO 8601 text, and any other value unchanged."""
    if type(value) is int:
        try:
            return (dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=value)).isoformat()
        except OverflowError:
            return str(value)
    return value


def _quarantine_text(message: bytes | None) -> str:
    return json.dumps({"message": (message or b"").decode(errors="replace")})
