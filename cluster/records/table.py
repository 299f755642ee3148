"""The Delta table of a log, with its compacted records. Its files are encrypted with the keys of their segments.

A commit lists its segments as Delta's application transactions. So the segments of a table version are known without
reading a row: no segment can be added twice, and readers know which segment files to skip. Each file has one key. The
file's partition is the key's column class, and readers verify that the file has a key of this class.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from cluster.errors import CommitConflict, RecordLogCorrupt
from cluster.host.fsync import sync_file, sync_folder
from cluster.known_fields import known_fields
from cluster.records.columns import LINE, SEGMENT, schema, to_record
from cluster.security.encryption.parquet import ProtectedFiles, Protection
from cluster.storage import file_system, is_uri

FOLDER, UNFINISHED_FOLDER = "table", "table.new"
HISTORY = "_delta_log"
CLASS = "column_class"
_APP_PREFIX, _METADATA_KEY = "falaj.segment.", "falaj.compaction"


class StoredRecord(NamedTuple):
    """A record with its position in the log."""

    segment: str
    line: int
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFile:
    """A file of the table."""

    path: str
    """Path relative to the table's folder."""
    column_class: str
    records: int
    size_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction:
    """Numbers of segments and records that one commit added."""

    segments: int
    records: int


class LogTable:
    """The table of a log, at its newest version when this object is created. The table may not exist yet.

    Args:
        log: Folder or URI of the log, `…/predictions/<model>` or `…/outcomes/<model>`.

    Raises:
        RecordLogCorrupt: The table exists, but its history cannot be read.
    """

    def __init__(self, log: str | Path) -> None:
        self._log = str(log)
        self._name = _name(self._log)
        self.kind = self._name.partition("/")[0]
        self.uri = f"{log}/{FOLDER}"
        self._table = _open(self.uri)
        self.files = () if self._table is None else _files(self._table)

    @property
    def records(self) -> int:
        """Number of records in all files. No key is needed."""
        return sum(file.records for file in self.files)

    def has(self, segment: str) -> bool:
        """Return whether the table has a segment's records."""
        return self._table is not None and self._table.transaction_version(_APP_PREFIX + segment) is not None

    def read(self, file: LogFile, files: ProtectedFiles) -> Iterator[StoredRecord]:
        """Yield a file's records.

        Raises:
            ProtectedFileCorrupt: The file was changed, or was not written for this log.
            AccessDenied, KeyRevoked: The key store refuses the key.
        """
        table = read_columns(self._log, file, files)
        for batch in table.to_batches(max_chunksize=10_000):
            for row in batch.to_pylist():
                yield StoredRecord(row[SEGMENT], row[LINE], to_record(self.kind, row))

    def write(self, rows: Sequence[Mapping[str, Any]], column_class: str, files: ProtectedFiles) -> LogFile:
        """Write rows as one file. `commit` makes the file a part of the table."""
        return self.write_columns(pa.Table.from_pylist(list(rows), schema(self.kind)), column_class, files)

    def write_columns(self, rows: pa.Table, column_class: str, files: ProtectedFiles) -> LogFile:
        """Write rows that are columns already, see `write`. Their schema is `cluster.records.columns.schema`."""
        path = f"{CLASS}={column_class}/{uuid.uuid4().hex}.parquet"
        size = files.write(rows, f"{self.uri}/{path}", self._protection(column_class), place=self._aad(path))
        return LogFile(path=path, column_class=column_class, records=rows.num_rows, size_bytes=size)

    def ensure(self) -> DeltaTable:
        """Return the Delta table. Create the table if it does not exist.

        The table is created before the first file is written. So if a file exists without a table, the table was lost.
        """
        if self._table is None:
            self._table = _create(self.uri, schema(self.kind))
        return self._table

    def commit(self, files: Sequence[LogFile], segments: Sequence[str]) -> int:
        """Add files and list their segments, in one transaction. Return the table's new version.

        Raises:
            CommitConflict: Another process committed at the same time; nothing was changed.
        """
        compaction = Compaction(segments=len(segments), records=sum(file.records for file in files))
        properties = CommitProperties(
            custom_metadata={_METADATA_KEY: json.dumps(asdict(compaction))},
            max_commit_retries=0,
            app_transactions=[Transaction(_APP_PREFIX + segment, 1) for segment in segments],
        )
        actions: list[AddAction | RemoveAction] = [_add_action(file) for file in files]
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
                f"Another process committed to {self.uri} at the same time; nothing was changed. Run it again."
            ) from error
        return int(DeltaTable(self.uri).version())

    def sync_files(self, files: Sequence[LogFile]) -> None:
        """Flush the folders of new files to disk, because they must survive a power cut if their commit does.

        An object store has the files since they were written.
        """
        if not is_uri(self.uri):
            for folder in {(Path(self.uri) / file.path).parent for file in files} | {Path(self.uri)}:
                sync_folder(folder)

    def sync(self) -> None:
        """Flush the table's history and folders to disk, because Delta does not. This covers earlier commits too."""
        if is_uri(self.uri):
            return
        folder = Path(self.uri)
        history = folder / HISTORY
        for path in history.iterdir():
            if path.is_file():
                sync_file(path)
        for synced in (history, *folder.glob(f"{CLASS}=*"), folder, folder.parent):
            sync_folder(synced)

    def uncommitted_files(self) -> list[str]:
        """Return the URIs of files that no commit names: a compaction wrote them that was killed, or still runs."""
        committed = {file.path for file in self.files}
        fs, root = file_system(self.uri)
        paths = [str(path)[len(root) :].lstrip("/") for path in (fs.find(root) if fs.exists(root) else ())]
        return [
            f"{self.uri}/{path}" for path in paths if path.startswith(f"{CLASS}=") and path not in committed
        ]

    def compactions(self) -> dict[int, Compaction]:
        """Return all compactions by table version."""
        history = [] if self._table is None else self._table.history()
        return {
            int(entry["version"]): Compaction(**known_fields(Compaction, json.loads(entry[_METADATA_KEY])))
            for entry in history
            if _METADATA_KEY in entry
        }

    def _protection(self, column_class: str) -> Protection:
        return _protection(self._name, column_class)

    def _aad(self, path: str) -> str:
        return _aad(self._name, path)


def read_columns(
    log: str, file: LogFile, files: ProtectedFiles, columns: Sequence[str] | None = None
) -> pa.Table:
    """Return some columns, by default all, of one file of a log's table. The JSON columns are text.

    Only plain data is needed to find the file, so a task on another node can call this.

    Args:
        log: Folder or URI of the log.
        file: The file.
        files: Reader of protected files.
        columns: Names of the columns, see `cluster.records.columns`.

    Raises:
        ProtectedFileCorrupt: The file was changed, or was not written for this log.
        AccessDenied, KeyRevoked: The key store refuses the key.
    """
    name = _name(log)
    return files.read(
        f"{log}/{FOLDER}/{file.path}",
        columns,
        protection=_protection(name, file.column_class),
        place=_aad(name, file.path),
    )


def _name(log: str) -> str:
    return "/".join(log.split("/")[-2:])


def _protection(name: str, column_class: str) -> Protection:
    return Protection(default=f"{name}/{column_class}", keys=((SEGMENT, None), (LINE, None)))


def _aad(name: str, path: str) -> str:
    return f"{name}/{FOLDER}/{path}"


def _open(uri: str) -> DeltaTable | None:
    """Open the table; return None if nothing was compacted yet."""
    fs, root = file_system(uri)
    for _ in range(2):  # another process may create the table between the two looks
        try:
            return DeltaTable(uri)
        except TableNotFoundError as error:
            reason = str(error)
            if not (Path(uri).exists() if not is_uri(uri) else fs.find(root)):
                return None
        except DeltaError as error:
            reason = str(error)
            break
    raise RecordLogCorrupt(
        f"{uri} exists, but its history cannot be read ({reason.partition(chr(10))[0]}), so its records are unknown. "
        f"Nothing was changed. Restore {uri}/{HISTORY} from a backup."
    )


def _create(uri: str, columns: pa.Schema) -> DeltaTable:
    """Create the table atomically, on a disk flushed."""
    if is_uri(uri):
        return _create_at(uri, columns)
    folder = Path(uri)
    unfinished = folder.with_name(UNFINISHED_FOLDER)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    _create_at(str(unfinished), columns)
    for path in (unfinished / HISTORY).iterdir():
        sync_file(path)
    for new_folder in (unfinished / HISTORY, unfinished):
        sync_folder(new_folder)
    unfinished.rename(folder)
    sync_folder(folder.parent)
    return DeltaTable(uri)


def _create_at(uri: str, columns: pa.Schema) -> DeltaTable:
    return DeltaTable.create(
        uri,
        schema=_with_class(columns),
        partition_by=[CLASS],
        configuration={"delta.enableExpiredLogCleanup": "false"},  # `compactions` needs the whole history
        mode="ignore",
    )


def _with_class(columns: pa.Schema) -> Schema:
    return Schema.from_arrow(columns.append(pa.field(CLASS, pa.string())))


def _add_action(file: LogFile) -> AddAction:
    """Return the action that adds a file. It has no column minima and maxima: they would reveal protected values."""
    stats = json.dumps({"numRecords": file.records})
    now = int(time.time() * 1000)
    return AddAction(file.path, file.size_bytes, {CLASS: file.column_class}, now, True, stats)


def _files(table: DeltaTable) -> tuple[LogFile, ...]:
    # `pa.table` and time columns are avoided: for both, Arrow would import pandas.
    actions = pa.RecordBatchReader.from_stream(table.get_add_actions(flatten=True)).read_all()
    rows: list[dict[str, Any]] = actions.select(
        ["path", f"partition.{CLASS}", "num_records", "size_bytes"]
    ).to_pylist()
    return tuple(
        LogFile(
            path=row["path"],
            column_class=row[f"partition.{CLASS}"],
            records=int(row["num_records"]),
            size_bytes=int(row["size_bytes"]),
        )
        for row in sorted(rows, key=lambda row: str(row["path"]))
    )
