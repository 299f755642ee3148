"""Units of a log: the files of its table, and the segments that are not in the table yet.

Files of the table never change, and any node can read them if the storage root is shared. Segments are read by the job
itself, because they may be on the disk of its machine or in the ledger's database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import RecordLogCorrupt
from cluster.records.columns import LINE, SEGMENT, schema, to_row
from cluster.records.contents import SegmentListing, list_all, segment_records
from cluster.records.location import LogLocation
from cluster.records.reading import MAX_MISSES
from cluster.records.table import LogFile, LogTable, read_columns
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess, key_store
from jobs.monitor.log.index import SegmentCount

BATCH_ROWS = 20_000
_UPLOADED = -2
"""Mark of an uploaded segment, which gets no more records."""
_IN_TABLE = -1


class Unit(NamedTuple):
    """A file of the table, or a segment."""

    name: str
    """Path of the file, or name of the segment."""
    mark: int
    """Equal marks mean equal content. For an open segment it is the size in bytes."""
    file: LogFile | None
    """None for a segment."""


@dataclass(kw_only=True, slots=True)
class IndexedUnit:
    """The counts of a unit."""

    mark: int
    segments: dict[str, SegmentCount] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"mark": self.mark, "segments": {name: one.to_json() for name, one in self.segments.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> IndexedUnit:
        """Return what `to_json` converted."""
        segments = {name: SegmentCount.from_json(one) for name, one in data["segments"].items()}
        return cls(mark=data["mark"], segments=segments)


Index = dict[str, IndexedUnit]
"""Counts by the unit's name."""


class OpenLog:
    """The units of a log at one moment, and the content of its segments."""

    def __init__(self, location: LogLocation, access: KeyAccess) -> None:
        self.location = location
        self._access = access
        self._listing: SegmentListing = list_all(location)
        table = LogTable(location.root)
        self.units = [Unit(file.path, _IN_TABLE, file) for file in table.files]
        waiting = [name for name in self._listing.names if not table.has(name)]
        self.units += [Unit(name, self._mark(name), None) for name in waiting]

    def _mark(self, segment: str) -> int:
        if segment in self._listing.uploaded:
            return _UPLOADED
        try:
            on_disk = (self.location.folder / f"{segment}.records").stat().st_size
        except FileNotFoundError:
            on_disk = 0
        return max(on_disk, self._listing.block_bytes.get(segment, 0))

    def read_segment(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Return the complete records of a segment, as in the log's table. A compaction may have moved it there.

        Raises:
            RecordLogCorrupt: A record was changed or removed, or the segment is lost.
        """
        for _ in range(MAX_MISSES):
            try:
                if (segment := self._listing.find(name)) is not None:
                    records = segment_records(segment, key_store(self._access))
                    return _as_table(self.location.kind, name, records, columns)
            except FileNotFoundError:
                pass  # it was just moved, to the shared folder or to the table
            tables = self._moved_to_table(name, columns)
            if any(table.num_rows for table in tables):
                return pa.concat_tables(tables)
        raise RecordLogCorrupt(
            f"Segment {name} of {self.location.name} was deleted while it was read, and its records are not in the "
            "table. Restore it from a backup."
        )

    def _moved_to_table(self, segment: str, columns: Sequence[str]) -> list[pa.Table]:
        """Return the records of a segment in the files that the table has got since this log was opened."""
        known = {unit.name for unit in self.units}
        files = protected_files(self._access)
        tables = [
            read_columns(self.location.root, file, files, list(columns))
            for file in LogTable(self.location.root).files
            if file.path not in known
        ]
        return [table.filter(pc.equal(table[SEGMENT], segment)) for table in tables]


def _as_table(kind: str, segment: str, records: Iterable[dict[str, Any]], columns: Sequence[str]) -> pa.Table:
    """Convert records to a table, some thousand at a time, because Python objects take more memory than columns."""
    wanted = schema(kind)
    batches, rows = [], []
    for line, record in enumerate(records):
        rows.append(to_row(kind, segment, line, record))
        if len(rows) == BATCH_ROWS:
            batches.append(pa.Table.from_pylist(rows, wanted).select(columns))
            rows = []
    batches.append(pa.Table.from_pylist(rows, wanted).select(columns))
    return pa.concat_tables(batches)


def unchanged(kept: Index, units: Iterable[Unit]) -> Index:
    """Return the kept counts of the units that have not changed."""
    return {
        unit.name: kept[unit.name]
        for unit in units
        if unit.name in kept and kept[unit.name].mark == unit.mark
    }


def read_units(
    root: str, files: Sequence[LogFile], access: KeyAccess, columns: Sequence[str]
) -> Iterable[tuple[str, pa.Table]]:
    """Yield the path and the records of each file of a log's table."""
    reader = protected_files(access)
    for file in files:
        yield file.path, read_columns(root, file, reader, list(columns))


def index_table(
    table: pa.Table, mark: int, count: Callable[[pa.Table], dict[str, SegmentCount]]
) -> IndexedUnit:
    """Return the counts of a unit's records."""
    return IndexedUnit(mark=mark, segments=count(table))


def known_lines(rows: pl.DataFrame, lines: Mapping[str, int]) -> pl.DataFrame:
    """Return the rows that the index has counted. An open segment may have more by now.

    Args:
        rows: Rows with the columns `segment` and `line`.
        lines: Number of counted lines by segment. Rows of other segments are left out.
    """
    limits = pl.DataFrame(
        {SEGMENT: list(lines), "_lines": list(lines.values())},
        schema={SEGMENT: pl.String, "_lines": pl.Int64},
    )
    joined = rows.join(limits, on=SEGMENT, how="inner", maintain_order="left")
    return joined.filter(pl.col(LINE) < pl.col("_lines")).drop("_lines")
