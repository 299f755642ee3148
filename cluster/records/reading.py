"""A log as one: its records, how many there are, and their frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from cluster.records.segments import count_segment, segment_records, segments
from cluster.security.keys.store import KeyStore


def read_records(folder: Path, store: KeyStore) -> Iterator[dict[str, Any]]:
    """All whole records of a log, segment by segment.

    Raises:
        RecordLogCorrupt: a record was altered, moved or taken out, or the segment is under a key that is none of this
            log's, naming file and line.
        AccessDenied, KeyRevoked: as the key store says.
    """
    for path in segments(folder):
        yield from segment_records(path, store)


def count_records(folder: Path) -> int:
    """The number of whole records of a log; needs no key."""
    return sum(count_segment(path) for path in segments(folder))


def read_predictions(folder: Path, store: KeyStore) -> pl.DataFrame:
    """One row per predicted entity; raises as `read_records`.

    Columns: prediction_id, row, request_id, time and as_of (UTC), model, version, variant, rollout, arm, unit_hash,
    those of `probability`, `label`, `value`, `probabilities` that the task has, and every model input by its name.
    """
    rows = [
        _head(record)
        | {"row": row}
        | prediction
        | {name: values[row] for name, values in record["features"].items()}
        for record in read_records(folder, store)
        for row, prediction in enumerate(record["predictions"])
    ]
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return frame.with_columns(_times(frame, "time", "as_of"))


def read_outcomes(folder: Path, store: KeyStore) -> pl.DataFrame:
    """The last received outcome per prediction and row: prediction_id, row, outcome, observed_at, received_at (UTC).

    Raises as `read_records`.
    """
    frame = pl.DataFrame(list(read_records(folder, store)), infer_schema_length=None)
    if frame.is_empty():
        return frame
    frame = frame.with_columns(_times(frame, "observed_at", "received_at"))
    return frame.sort("received_at", maintain_order=True).unique(
        ["prediction_id", "row"], keep="last", maintain_order=True
    )


def _head(record: dict[str, Any]) -> dict[str, Any]:
    nested = ("entities", "features", "predictions", "given")
    return {name: value for name, value in record.items() if name not in nested}


def _times(frame: pl.DataFrame, *columns: str) -> list[pl.Expr]:
    return [
        pl.col(name).str.to_datetime(time_unit="us", time_zone="UTC")
        for name in columns
        if name in frame.columns
    ]
