"""What replicas write down: one prediction record per HTTP answer, and the outcomes that come later.

A record is one line, appended with one write to a file that only one process writes, a segment. Once `append` has
returned the line is the kernel's, so kill -9 of the process loses nothing; a power cut may lose the last seconds. A
line cut short belongs to an answer that never left, and is passed over.

A segment's first line names its key and holds its data key, wrapped; every other line is a record as JSON, encrypted
(AES-256-GCM) and bound to its log, segment and number, so that none can be altered, moved or left out of the middle
unseen. That the last ones are missing shows only against the edge's access records. Whoever writes needs to wrap only,
so a replica cannot read what others have logged. How many records there are can be counted without a key.
"""

from __future__ import annotations

import base64
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import polars as pl

from cluster.errors import ArtifactTampered, RecordLogCorrupt
from cluster.security.envelope import ValueCipher, place_of
from cluster.security.keys.store import COLUMN_CLASSES, KeyStore

SUFFIX = ".records"


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
    given: list[str] = field(default_factory=list)
    """Inputs that the client gave itself; older records do not have it."""
    defaulted: dict[str, list[int]] = field(default_factory=dict)
    """Input to the rows whose value was missing or expired, and is the feature service's default; older records do
    not have it."""


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

    def __init__(self, folder: Path, *, store: KeyStore, key: str) -> None:
        """Start a segment.

        Args:
            folder: the log, `predictions/<model>` or `outcomes/<model>`.
            store: wraps the segment's data key.
            key: what it is wrapped under.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
        """
        self._cipher, wrapped = ValueCipher.create(store, key)
        folder.mkdir(parents=True, exist_ok=True)
        segment = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}"
        self.path = folder / f"{segment}{SUFFIX}"
        self._place = _segment_place(self.path)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        self._count = 0
        self._write(orjson.dumps({"key": key, "data_key": wrapped}) + b"\n")

    def append(self, *records: PredictionRecord | OutcomeRecord) -> None:
        """Write records, all or none of them readable.

        Raises:
            OSError: the disk is full or failed; the next append starts a clean line.
        """
        lines = [
            base64.b64encode(
                self._cipher.encrypt(orjson.dumps(record), place_of(self._place, b"%d" % number))
            )
            + b"\n"
            for number, record in enumerate(records, start=self._count)
        ]
        self._write(b"".join(lines))
        self._count += len(records)

    def _write(self, data: bytes) -> None:
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


def read_records(folder: Path, store: KeyStore) -> Iterator[dict[str, Any]]:
    """All whole records of a log, segment by segment.

    Raises:
        RecordLogCorrupt: a record was altered, moved or taken out, or the segment is under a key that is none of this
            log's, naming file and line.
        AccessDenied, KeyRevoked: as the key store says.
    """
    for path in _segments(folder):
        with path.open("rb") as file:
            header = file.readline()
            if header.endswith(b"\n"):
                cipher, place = _cipher(path, header, store), _segment_place(path)
                for number, line in enumerate(file):
                    if line.endswith(b"\n"):
                        yield _record(path, number, line, cipher, place)


def count_records(folder: Path) -> int:
    """The number of whole records of a log; needs no key."""
    count = 0
    for path in _segments(folder):
        with path.open("rb") as file:
            count += max(sum(line.endswith(b"\n") for line in file) - 1, 0)
    return count


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def _cipher(path: Path, header: bytes, store: KeyStore) -> ValueCipher:
    try:
        stated = orjson.loads(header)
        key, wrapped = stated["key"], stated["data_key"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise RecordLogCorrupt(f"{path}: the first line was altered. Restore it from a backup.") from error
    if not _is_of_this_log(path, key):
        raise RecordLogCorrupt(
            f"{path}: it says that it is under key {key!r}, which is none of this log's. Restore it from a backup."
        )
    return ValueCipher.open(store, key, wrapped)


def _is_of_this_log(path: Path, key: object) -> bool:
    """Whether a segment's key is of its own folder: `predictions/<model>/<class>` for `predictions/<model>`. A segment
    names its key itself, and who may write under another one could else lay records of his own there."""
    log, _, column_class = str(key).rpartition("/")
    return isinstance(key, str) and log == "/".join(path.parts[-3:-1]) and column_class in COLUMN_CLASSES


def _record(path: Path, number: int, line: bytes, cipher: ValueCipher, place: str) -> dict[str, Any]:
    try:
        data = cipher.decrypt(base64.b64decode(line[:-1], validate=True), place_of(place, b"%d" % number))
    except (ArtifactTampered, ValueError) as error:
        raise RecordLogCorrupt(
            f"{path}, line {number + 2}: the record was altered, or one before it was taken out. "
            "Restore the file from a backup."
        ) from error
    return dict(orjson.loads(data))


def _segment_place(path: Path) -> str:
    """What records are bound to besides their number: their log, `predictions/<model>`, and segment."""
    return "/".join(path.parts[-3:])


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
    nested = ("entities", "features", "predictions", "given", "defaulted")
    return {name: value for name, value in record.items() if name not in nested}


def _times(frame: pl.DataFrame, *columns: str) -> list[pl.Expr]:
    return [
        pl.col(name).str.to_datetime(time_unit="us", time_zone="UTC")
        for name in columns
        if name in frame.columns
    ]
