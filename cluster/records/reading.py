"""A log as one, whether its records lie in segments yet or in the table.

A compaction may run beside a reader. Segments are listed before the table is opened, and a segment is deleted only
when its records are in the table: so what is listed is in the table, or still there, or was deleted since, and then a
newer version of the table has it. Each record is given once, and none that was there at the beginning is missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from cluster.errors import RecordLogCorrupt
from cluster.records.schema import SHADOW
from cluster.records.segments import count_segment, segment_records, segments
from cluster.records.table import LogTable
from cluster.security.keys.store import KeyStore
from cluster.security.parquet import ProtectedFiles


def read_records(folder: Path, store: KeyStore) -> Iterator[dict[str, Any]]:
    """All whole records of a log; of each segment in their order.

    Raises:
        RecordLogCorrupt, ProtectedFileCorrupt: a record was altered, moved or taken out, or a file is under a key that
            is none of this log's, naming the file.
        AccessDenied, KeyRevoked: as the key store says.
    """
    return (record for _, _, record in _placed(folder, store))


def _placed(folder: Path, store: KeyStore) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Each record with its segment and its place there."""
    listed = segments(folder)
    table, files = LogTable(folder), ProtectedFiles(store)
    read: set[str] = set()
    given: set[str] = set()
    while True:
        for file in table.files:
            if file.path not in read:
                yield from (one for one in table.read(file, files) if one[0] not in given)
                read.add(file.path)
        deleted = None
        for path in listed:
            if path.stem in given or table.has(path.stem):
                continue
            try:
                for number, record in enumerate(segment_records(path, store)):
                    yield path.stem, number, record
            except FileNotFoundError:
                deleted = path
                break
            given.add(path.stem)
        if deleted is None:
            return
        table = LogTable(folder)
        if not table.has(deleted.stem):
            raise RecordLogCorrupt(
                f"{deleted} was deleted while it was read, and is not in the table. Restore it from a backup."
            )


def count_records(folder: Path) -> int:
    """The number of whole records of a log; needs no key."""
    while True:
        listed, table = segments(folder), LogTable(folder)
        try:
            return table.records + sum(count_segment(path) for path in listed if not table.has(path.stem))
        except FileNotFoundError:  # a compaction has just deleted it, so it is in the table now
            continue


def read_predictions(folder: Path, store: KeyStore) -> pl.DataFrame:
    """One row per predicted entity of an answer, in the order in which they were written; raises as `read_records`.

    What a shadow predicted is left out: nobody was answered with it, so it is in no figure of what was served.

    Columns: prediction_id, row, request_id, time and as_of (UTC), model, version, variant, rollout, arm, unit_hash,
    those of `probability`, `label`, `value`, `probabilities` that the task has, and every model input by its name.
    """
    return _predictions(one for one in _in_order(folder, store) if one["arm"] != SHADOW)


def read_shadow_predictions(folder: Path, store: KeyStore) -> pl.DataFrame:
    """What shadows predicted, as `read_predictions` gives the others; `request_id` is that of the answer beside it."""
    return _predictions(one for one in _in_order(folder, store) if one["arm"] == SHADOW)


def _predictions(records: Iterable[dict[str, Any]]) -> pl.DataFrame:
    rows = [
        _head(record)
        | {"row": row}
        | prediction
        | {name: values[row] for name, values in record["features"].items()}
        for record in records
        for row, prediction in enumerate(record["predictions"])
    ]
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return frame.with_columns(_times(frame, "time", "as_of"))


def read_outcomes(folder: Path, store: KeyStore) -> pl.DataFrame:
    """The last received outcome per prediction and row: prediction_id, row, outcome, observed_at, received_at (UTC).

    Of two that were received in the same instant, the one that was written last counts. Raises as `read_records`.
    """
    frame = pl.DataFrame(_in_order(folder, store), infer_schema_length=None)
    if frame.is_empty():
        return frame
    frame = frame.with_columns(_times(frame, "observed_at", "received_at"))
    return frame.sort("received_at", maintain_order=True).unique(
        ["prediction_id", "row"], keep="last", maintain_order=True
    )


def _in_order(folder: Path, store: KeyStore) -> list[dict[str, Any]]:
    """By segment and place, so that frames do not depend on what was compacted."""
    placed = sorted(_placed(folder, store), key=lambda one: one[:2])
    return [record for _, _, record in placed]


def _head(record: dict[str, Any]) -> dict[str, Any]:
    """What is one value for the whole answer."""
    return {name: value for name, value in record.items() if not isinstance(value, list | dict)}


def _times(frame: pl.DataFrame, *columns: str) -> list[pl.Expr]:
    return [
        pl.col(name).str.to_datetime(time_unit="us", time_zone="UTC")
        for name in columns
        if name in frame.columns
    ]
