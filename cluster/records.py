"""What replicas write down: one prediction record per HTTP answer, and the outcomes that come later.

A record is one JSON line, appended with one write to a file that only one process writes. Once `write` has returned the
line is the kernel's, so kill -9 of the process loses nothing; a power cut may lose the last seconds. A line cut short
belongs to an answer that never left, and is passed over.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import polars as pl

SUFFIX = ".jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionRecord:
    """One answer of a replica."""

    prediction_id: str
    request_id: str
    """The edge's id of the request, empty when the replica was addressed directly."""
    time: str
    model: str
    version: int
    variant: str
    rollout: str
    """Empty outside any rollout."""
    arm: str
    """`treatment`, `control`, `outside` or `none` (no unit given)."""
    unit_hash: str
    as_of: str
    entities: list[dict[str, Any]]
    features: dict[str, list[Any]]
    """Model input to one value per entity."""
    predictions: list[dict[str, Any]]
    """As answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomeRecord:
    """What came true for one row of one answer."""

    prediction_id: str
    row: int = 0
    outcome: int | float | str
    """Class label, or value of a regression."""
    observed_at: str
    received_at: str


class SegmentWriter:
    """Appends records to a file of this process alone."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}{SUFFIX}"
        self.path = folder / name
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)

    def append(self, *records: PredictionRecord | OutcomeRecord) -> None:
        """Write records, all or none of them readable.

        Raises:
            OSError: the disk is full or failed; the next append starts a clean line.
        """
        data = b"".join(orjson.dumps(record) + b"\n" for record in records)
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        if written != len(data):
            os.ftruncate(self._descriptor, size)
            raise OSError(f"{self.path}: the disk took {written} of {len(data)} bytes.")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """All whole records of a folder, file by file."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield orjson.loads(line)


def count_predictions(folder: Path) -> int:
    """The number of logged answers."""
    return sum(1 for _ in read_records(folder))


def read_predictions(folder: Path) -> pl.DataFrame:
    """One row per predicted entity.

    Columns: prediction_id, row, request_id, time and as_of (UTC), model, version, variant, rollout, arm, unit_hash,
    those of `probability`, `label`, `value`, `probabilities` that the task has, and every model input by its name.
    """
    rows = [
        _head(record)
        | {"row": row}
        | prediction
        | {name: values[row] for name, values in record["features"].items()}
        for record in read_records(folder)
        for row, prediction in enumerate(record["predictions"])
    ]
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return frame.with_columns(_times(frame, "time", "as_of"))


def read_outcomes(folder: Path) -> pl.DataFrame:
    """The last received outcome per prediction and row: prediction_id, row, outcome, observed_at, received_at (UTC)."""
    frame = pl.DataFrame(list(read_records(folder)), infer_schema_length=None)
    if frame.is_empty():
        return frame
    frame = frame.with_columns(_times(frame, "observed_at", "received_at"))
    return frame.sort("received_at", maintain_order=True).unique(
        ["prediction_id", "row"], keep="last", maintain_order=True
    )


def _head(record: dict[str, Any]) -> dict[str, Any]:
    nested = ("entities", "features", "predictions")
    return {name: value for name, value in record.items() if name not in nested}


def _times(frame: pl.DataFrame, *columns: str) -> list[pl.Expr]:
    return [
        pl.col(name).str.to_datetime(time_unit="us", time_zone="UTC")
        for name in columns
        if name in frame.columns
    ]
