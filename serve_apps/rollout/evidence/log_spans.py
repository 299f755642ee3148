"""Read some columns of a log for a span of time, part by part.

A part is a file of the log's table, or a segment that is not in the table yet. The time range of each part is
remembered, so parts outside the span are read only once. Memory holds one part, and what the caller keeps of it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import FalajError
from cluster.records.columns import TIME, schema, to_row
from cluster.records.contents import StoredSegment, list_all, segment_records
from cluster.records.location import LogLocation
from cluster.records.table import LogTable, read_columns
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.store import KeyStore

BATCH_ROWS = 20_000


class LogMoved(FalajError):
    """A segment was moved to the table while the log was read. Read the span again."""


class LogSpans:
    """Reads spans of one log.

    Args:
        location: Where the log is.
        store: Gives the keys.
        time: The column with a record's time: `time` or `received_at`.
    """

    def __init__(self, location: LogLocation, store: KeyStore, *, time: str) -> None:
        self._location = location
        self._store = store
        self._time = time
        self._ranges: dict[tuple[str, int], tuple[dt.datetime, dt.datetime] | None] = {}
        """First and last time of each part, by its name and size. None: it has no time."""

    def read(self, since: dt.datetime, until: dt.datetime, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the records with `since <= time < until` of each part that has any.

        Raises:
            LogMoved: A segment was moved while the log was read.
            RecordLogCorrupt, ProtectedFileCorrupt, AccessDenied, KeyRevoked: As for `reading.read_records`.
        """
        listing, log = list_all(self._location), self._location.root
        table, files = LogTable(log), ProtectedFiles(self._store)
        names = list(dict.fromkeys((*columns, self._time)))
        for file in table.files:
            key = (file.path, file.size_bytes)
            if self._may_have(key, since, until):
                yield from self._within(key, read_columns(log, file, files, names), since, until)
        for name in listing.names:
            if table.has(name):
                continue
            segment = listing.find(name)
            if segment is None:
                raise LogMoved(f"Segment {name} of {self._location.name} was moved while the log was read.")
            try:
                for number, rows in enumerate(_batches(segment, self._location.kind, names, self._store)):
                    yield from self._within((f"{name}/{number}", -1), rows, since, until)
            except FileNotFoundError as error:
                raise LogMoved(f"Segment {name} was moved while it was read.") from error

    def _may_have(self, key: tuple[str, int], since: dt.datetime, until: dt.datetime) -> bool:
        if key not in self._ranges:
            return True
        found = self._ranges[key]
        return found is not None and found[0] < until and found[1] >= since

    def _within(
        self, key: tuple[str, int], rows: pa.Table, since: dt.datetime, until: dt.datetime
    ) -> Iterator[pa.Table]:
        times = rows[self._time]
        if key[1] >= 0:
            ends = pc.min_max(times).as_py()
            self._ranges[key] = None if ends["min"] is None else (ends["min"], ends["max"])
        inside = pc.and_(
            pc.greater_equal(times, pa.scalar(since, TIME)), pc.less(times, pa.scalar(until, TIME))
        )
        found = rows.filter(inside)
        if found.num_rows:
            yield found


def _batches(segment: StoredSegment, kind: str, names: Sequence[str], store: KeyStore) -> Iterator[pa.Table]:
    """Yield the records of a segment as columns, some thousand at a time."""
    rows: list[dict[str, Any]] = []
    for line, record in enumerate(segment_records(segment, store)):
        rows.append(to_row(kind, segment.name, line, record))
        if len(rows) == BATCH_ROWS:
            yield pa.Table.from_pylist(rows, schema(kind)).select(names)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema(kind)).select(names)
