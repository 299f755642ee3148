"""The table of a log: what was compacted, in Delta, its files protected under the keys of the segments they came from.

Each segment that a commit took is named in it as an application transaction. So a version of the table says which
segments are in it, for good and without a look at any row: no segment can be taken twice, and a reader knows which of
those on the disk to pass over. A file is under one key; the partition says of which class, and a reader holds the file
against that.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from cluster.errors import CommitConflict, RecordLogCorrupt
from cluster.records.columns import LINE, SEGMENT, schema, to_record
from cluster.security.encryption.parquet import ProtectedFiles, Protection
from cluster.synced import sync_file, sync_folder

FOLDER, UNBORN_FOLDER = "table", "table.new"
HISTORY = "_delta_log"
CLASS = "column_class"
_APP, _SAID = "falaj.segment.", "falaj.compaction"


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFile:
    """A file of the table."""

    path: str
    """Relative to the table."""
    column_class: str
    records: int
    size_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction:
    """What a commit says of itself."""

    segments: int
    records: int


class LogTable:
    """The newest version of a log's table when this was made.

    Args:
        log: the log's folder, `predictions/<model>` or `outcomes/<model>`.

    Raises:
        RecordLogCorrupt: there is a table, but its history cannot be read.
    """

    def __init__(self, log: Path) -> None:
        self.kind, self._name = log.parts[-2], "/".join(log.parts[-2:])
        self.folder = log / FOLDER
        self._table = _opened(self.folder)
        self.files = () if self._table is None else _files(self._table)

    @property
    def records(self) -> int:
        """In all files; needs no key."""
        return sum(file.records for file in self.files)

    def has(self, segment: str) -> bool:
        """Whether a segment's records are in it."""
        return self._table is not None and self._table.transaction_version(_APP + segment) is not None

    def read(self, file: LogFile, files: ProtectedFiles) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """A file's records, each with its segment and line.

        Raises:
            ProtectedFileCorrupt: it was altered, or is not the one that was written for this log.
            AccessDenied, KeyRevoked: as the key store says.
        """
        table = files.read(
            str(self.folder / file.path),
            protection=self._protection(file.column_class),
            place=self._place(file.path),
        )
        for batch in table.to_batches(max_chunksize=10_000):
            for row in batch.to_pylist():
                yield row[SEGMENT], row[LINE], to_record(self.kind, row)

    def write(self, rows: Sequence[Mapping[str, Any]], column_class: str, files: ProtectedFiles) -> LogFile:
        """Write rows as one file, which belongs to the table once it is committed."""
        path = f"{CLASS}={column_class}/{uuid.uuid4().hex}.parquet"
        size = files.write(
            pa.Table.from_pylist(list(rows), schema(self.kind)),
            str(self.folder / path),
            self._protection(column_class),
            place=self._place(path),
        )
        return LogFile(path=path, column_class=column_class, records=len(rows), size_bytes=size)

    def ensure(self) -> DeltaTable:
        """Have a table, before the first file is written: a file without a table says then that its table is lost."""
        if self._table is None:
            self._table = _created(self.folder, schema(self.kind))
        return self._table

    def commit(self, files: Sequence[LogFile], segments: Sequence[str]) -> int:
        """Add files and name the segments that they hold, in one transaction; gives the table's version.

        Raises:
            CommitConflict: somebody else committed meanwhile; nothing was changed.
        """
        said = Compaction(segments=len(segments), records=sum(file.records for file in files))
        properties = CommitProperties(
            custom_metadata={_SAID: json.dumps({"segments": said.segments, "records": said.records})},
            max_commit_retries=0,
            app_transactions=[Transaction(_APP + segment, 1) for segment in segments],
        )
        actions: list[AddAction | RemoveAction] = [_added(file) for file in files]
        try:
            self.ensure().create_write_transaction(
                actions,
                mode="append",
                schema=_with_class(schema(self.kind)),
                partition_by=[CLASS],
                commit_properties=properties,
            )
        except CommitFailedError as error:
            raise CommitConflict(
                f"Somebody else committed to {self.folder} meanwhile; nothing was changed. Run it again."
            ) from error
        return int(DeltaTable(str(self.folder)).version())

    def sync(self) -> None:
        """Have all on the disk that says what is in the table, whichever run wrote it; Delta syncs nothing itself."""
        history = self.folder / HISTORY
        for path in history.iterdir():
            if path.is_file():
                sync_file(path)
        for folder in (history, *self.folder.glob(f"{CLASS}=*"), self.folder, self.folder.parent):
            sync_folder(folder)

    def compactions(self) -> dict[int, Compaction]:
        """Table version to what it took, of every compaction."""
        history = [] if self._table is None else self._table.history()
        return {
            int(entry["version"]): Compaction(**json.loads(entry[_SAID]))
            for entry in history
            if _SAID in entry
        }

    def _protection(self, column_class: str) -> Protection:
        return Protection(default=f"{self._name}/{column_class}", keys=((SEGMENT, None), (LINE, None)))

    def _place(self, path: str) -> str:
        return f"{self._name}/{FOLDER}/{path}"


def _opened(folder: Path) -> DeltaTable | None:
    """None where nothing was compacted."""
    if not folder.exists():
        return None
    try:
        return DeltaTable(str(folder))
    except DeltaError as error:
        said = str(error).partition("\n")[0]
        raise RecordLogCorrupt(
            f"{folder} is there, but its history cannot be read ({said}), so nobody knows which records are in it. "
            f"Nothing was changed. Restore {folder / HISTORY} from a backup."
        ) from error


def _created(folder: Path, columns: pa.Schema) -> DeltaTable:
    """The folder appears whole and on the disk, or not at all."""
    unborn = folder.with_name(UNBORN_FOLDER)
    if unborn.exists():
        shutil.rmtree(unborn)
    unborn.mkdir(parents=True)
    DeltaTable.create(
        str(unborn),
        schema=_with_class(columns),
        partition_by=[CLASS],
        configuration={"delta.enableExpiredLogCleanup": "false"},  # compactions are found in its history
    )
    for path in (unborn / HISTORY).iterdir():
        sync_file(path)
    for made in (unborn / HISTORY, unborn):
        sync_folder(made)
    unborn.rename(folder)
    sync_folder(folder.parent)
    return DeltaTable(str(folder))


def _with_class(columns: pa.Schema) -> Schema:
    return Schema.from_arrow(columns.append(pa.field(CLASS, pa.string())))


def _added(file: LogFile) -> AddAction:
    """Without minima and maxima, which would show what is protected."""
    stats = json.dumps({"numRecords": file.records})
    now = int(time.time() * 1000)
    return AddAction(file.path, file.size_bytes, {CLASS: file.column_class}, now, True, stats)


def _files(table: DeltaTable) -> tuple[LogFile, ...]:
    # Neither as `pa.table`, nor with the times among the columns: for both, Arrow would import pandas.
    said = pa.RecordBatchReader.from_stream(table.get_add_actions(flatten=True)).read_all()
    named: list[dict[str, Any]] = said.select(
        ["path", f"partition.{CLASS}", "num_records", "size_bytes"]
    ).to_pylist()
    return tuple(
        LogFile(
            path=one["path"],
            column_class=one[f"partition.{CLASS}"],
            records=int(one["num_records"]),
            size_bytes=int(one["size_bytes"]),
        )
        for one in sorted(named, key=lambda one: str(one["path"]))
    )
