"""Read a whole log: the records in its segments, on this disk and uploaded, in the ledger's database and in its table.

Uploads and a compaction can run at the same time. Segments are listed before the table is opened, and a segment is
deleted only after its records are at the next place. So a listed segment is in the table, or still exists, or was moved
since then; in that case it is found again, or a newer version of the table has it. Each record is returned once, and no
record that existed at the start is missed. Records of other nodes that are on their disks only are not read;
`progress.log_age` says since when there may be any.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, NamedTuple

import polars as pl

from cluster.errors import RecordLogCorrupt
from cluster.records.contents import count_segment, list_all, segment_records
from cluster.records.location import AnyLog, location_of
from cluster.records.schema import SHADOW
from cluster.records.table import LogTable, StoredRecord
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.store import KeyStore

MAX_MISSES = 3
"""How often a segment can be moved while it is read: to the shared folder, and to the table."""


def read_records(log: AnyLog, store: KeyStore) -> Iterator[dict[str, Any]]:
    """Yield all complete records of a log. Records of one segment are in order.

    Raises:
        RecordLogCorrupt, ProtectedFileCorrupt: A record was changed, moved or removed, or a file's key does not belong
            to this log. The message names the file.
        AccessDenied, KeyRevoked: The key store refuses a key.
    """
    return (stored.record for stored in _stored_records(log, store))


def _stored_records(log: AnyLog, store: KeyStore) -> Iterator[StoredRecord]:
    location = location_of(log)
    listing = list_all(location)
    table, files = LogTable(location.root), ProtectedFiles(store)
    read_files: set[str] = set()
    read_segments: set[str] = set()
    misses: Counter[str] = Counter()
    while True:
        for file in table.files:
            if file.path not in read_files:
                yield from (
                    stored for stored in table.read(file, files) if stored.segment not in read_segments
                )
                read_files.add(file.path)
        unread = [name for name in listing.names if name not in read_segments and not table.has(name)]
        missing = None
        with contextlib.closing(listing.find_all(unread)) as segments:
            for name, segment in zip(unread, segments, strict=True):
                if segment is None:
                    missing = name
                    break
                try:
                    for line, record in enumerate(segment_records(segment, store)):
                        yield StoredRecord(name, line, record)
                except FileNotFoundError:
                    missing = name
                    break
                read_segments.add(name)
        if missing is None:
            return
        table = LogTable(location.root)
        misses[missing] += 1
        if misses[missing] >= MAX_MISSES and not table.has(missing):
            raise RecordLogCorrupt(
                f"Segment {missing} of {location.name} was deleted while it was read, and its records are not in the "
                "table. Restore it from a backup."
            )


def count_records(log: AnyLog) -> int:
    """Return the number of complete records of a log. No key is needed."""
    location = location_of(log)
    while True:
        listing, table = list_all(location), LogTable(location.root)
        with contextlib.suppress(FileNotFoundError):
            unread = [name for name in listing.names if not table.has(name)]
            counts = [
                None if segment is None else count_segment(segment) for segment in listing.find_all(unread)
            ]
            if None not in counts:
                return table.records + sum(count for count in counts if count is not None)
        # A segment was moved, to the shared folder or the table.


def read_predictions(log: AnyLog, store: KeyStore) -> pl.DataFrame:
    """Return the `answers` of `read_log`. The errors are those of `read_records`."""
    return read_log(log, store).answers


def read_shadow_predictions(log: AnyLog, store: KeyStore) -> pl.DataFrame:
    """Return the predictions of shadows, in the format of `read_predictions`.

    `request_id` is the id of the request whose copy the shadow got. The errors are those of `read_records`.
    """
    return build_log(record for record in _records_in_order(log, store) if record["arm"] == SHADOW).answers


def read_log(log: AnyLog, store: KeyStore) -> Log:
    """Return a model's answers and failures, in the order of writing. The errors are those of `read_records`.

    Predictions of shadows are not included: no client got them, so no figure about serving may include them.
    """
    return build_log(record for record in _records_in_order(log, store) if record["arm"] != SHADOW)


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """A model's log as two frames, with one row for each entity of a request.

    Both frames have the columns prediction_id, row, request_id, time and as_of (UTC), model, version, variant, rollout,
    arm, unit_hash.
    """

    answers: pl.DataFrame
    """Rows with an answer. They also have the task's columns (of `probability`, `label`, `value`, `probabilities`) and
    one column for each model input, except inputs with a name in `RESERVED_COLUMNS`. Values are as they were written: a
    column with several types is `pl.Object`, and `probabilities` too, because it contains dicts by class.
    `cluster.records.signature_types` converts the values to the types of a version's signature."""
    failures: pl.DataFrame
    """Rows without a finite score from the model. The column `fault` has the reason. No figure includes these rows."""


def build_log(records: Iterable[dict[str, Any]]) -> Log:
    """Return the answers and failures of prediction records, in their order."""
    answered: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for record in records:
        common = {name: record.get(name) for name in _COMMON}
        for row in range(max(len(record["predictions"]), len(record["entities"]))):
            fault = fault_of(record, row)
            if fault:
                failed.append(common | {"row": row, "fault": fault})
            else:
                features = record["features"].items()
                inputs = {name: values[row] for name, values in features if name not in RESERVED_COLUMNS}
                answered.append(common | {"row": row} | record["predictions"][row] | inputs)
    return Log(answers=_frame(answered, _COMMON), failures=_frame(failed, _COMMON | {"fault": pl.String}))


def read_outcomes(log: AnyLog, store: KeyStore) -> pl.DataFrame:
    """Return the last received outcome for each prediction and row.

    Columns: prediction_id, row, outcome, observed_at, received_at (UTC). Of two outcomes that were received at the same
    time, the one that was written last is returned. An outcome has the type that it was sent with. The errors are those
    of `read_records`.
    """
    received = _received_outcomes(log, store)
    return received.unique(["prediction_id", "row"], keep="last", maintain_order=True)


def iter_outcomes(log: AnyLog, store: KeyStore) -> Iterator[Outcome]:
    """Yield all outcomes in the order in which they were received. The errors are those of `read_records`."""
    frame = _received_outcomes(log, store)
    names = ("prediction_id", "row", "outcome")
    for prediction_id, row, value in zip(*(frame[name].to_list() for name in names), strict=True):
        yield Outcome(prediction_id, row, value)


def _received_outcomes(log: AnyLog, store: KeyStore) -> pl.DataFrame:
    """Return all outcomes in the order in which they were received. Without outcomes, the frame has no rows."""
    records = _records_in_order(log, store)
    if not records:
        return pl.DataFrame(schema=_OUTCOME | {"outcome": pl.Null})
    return _frame(records, _OUTCOME).sort("received_at", maintain_order=True)


class Outcome(NamedTuple):
    """An outcome as a client sent it."""

    prediction_id: str
    row: int
    value: Any


def fault_of(record: Mapping[str, Any], row: int) -> str:
    """Return the reason why a row of a record has no answer, or "" if the row has an answer.

    A null score is a fault too: an old release did not check scores and wrote NaN as null, with a useless label.
    """
    if fault := record.get("fault"):
        return str(fault)
    if row >= len(record["predictions"]):
        return "no answer"
    return "no finite score" if _is_unscored(record["predictions"][row]) else ""


def _is_unscored(prediction: Mapping[str, Any]) -> bool:
    scores = [prediction.get("probability", 0), prediction.get("value", 0)]
    return None in scores or None in (prediction.get("probabilities") or {}).values()


def is_faulty(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a row without an answer."""
    return bool(record.get("fault")) or any(map(_is_unscored, record.get("predictions", ())))


_TIME = pl.Datetime("us", "UTC")
_COMMON: dict[str, Any] = {
    "prediction_id": pl.String,
    "request_id": pl.String,
    "time": _TIME,
    "model": pl.String,
    "version": pl.Int64,
    "variant": pl.String,
    "rollout": pl.String,
    "arm": pl.String,
    "unit_hash": pl.String,
    "as_of": _TIME,
}
"""Columns whose type is the same for all models and versions."""
OUTCOME, INVALID_OUTCOME = "outcome", "odd_outcome"
RESERVED_COLUMNS = frozenset(
    {*_COMMON, "row", "probability", "label", "value", "probabilities", "fault", OUTCOME, INVALID_OUTCOME}
)
"""Reserved column names. An input with such a name is left out, because a client chooses the values of inputs. A client
must not be able to change an answer's arm or label."""
_OUTCOME: dict[str, Any] = {
    "prediction_id": pl.String,
    "row": pl.Int64,
    "observed_at": _TIME,
    "received_at": _TIME,
}
_NATIVE: dict[frozenset[type], Any] = {
    frozenset({bool}): pl.Boolean,
    frozenset({int}): pl.Int64,
    frozenset({float}): pl.Float64,
    frozenset({str}): pl.String,
}


def _records_in_order(log: AnyLog, store: KeyStore) -> list[dict[str, Any]]:
    """Return all records sorted by segment and line, so that frames do not depend on compactions."""
    ordered = sorted(_stored_records(log, store), key=lambda stored: (stored.segment, stored.line))
    return [stored.record for stored in ordered]


def _frame(rows: Sequence[Mapping[str, Any]], types: Mapping[str, Any]) -> pl.DataFrame:
    """Return a frame. Columns in `types` get these types; the values of all other columns stay unchanged."""
    if not rows:
        return pl.DataFrame(schema=dict(types))
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return pl.DataFrame([_column(name, values, types.get(name)) for name, values in columns.items()])


def _column(name: str, values: list[Any], dtype: Any) -> pl.Series:
    if dtype == _TIME:
        return pl.Series(name, [parse_time(value) for value in values], dtype=_TIME)
    if dtype is not None:
        return pl.Series(name, values, dtype=dtype, strict=False)
    return exact_column(name, values)


def exact_column(name: str, values: Sequence[Any]) -> pl.Series:
    """Return a column with unchanged values: of their common type, or of `pl.Object` if they have several types."""
    value_types = frozenset(map(type, values)) - {NoneType}
    try:
        return pl.Series(name, values, dtype=_NATIVE.get(value_types, pl.Object) if value_types else pl.Null)
    except (OverflowError, TypeError):  # an integer beyond 64 bits, which an older release may have logged
        return pl.Series(name, values, dtype=pl.Object)


def parse_time(text: Any) -> dt.datetime | None:
    """Parse a time. Invalid text becomes None, so that one bad value does not make the whole log unreadable."""
    try:
        time = dt.datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time.replace(tzinfo=dt.UTC) if time.tzinfo is None else time.astimezone(dt.UTC)
