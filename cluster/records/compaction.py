"""Move segments into a log's table, exactly once.

A segment can be moved when its writer has closed it or has ended, because then its lock is free. If the storage root is
remote, a segment can be moved when it is uploaded. Its records are written to encrypted files. One Delta transaction
adds these files and names the segment. The segment is deleted only when that transaction is durable.

If a compaction is killed before the transaction, files remain that no transaction refers to. If it is killed after the
transaction, segments remain whose records are already in the table; readers skip these segments. The next run removes
such files and segments. But it removes a file only if the file's records also exist elsewhere. If they do not, the
table that contained the file was lost.

One compaction of a log runs at a time. A lock on the disk excludes others on this machine, and a lock in PostgreSQL
those on other machines.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import sqlalchemy as sa

from cluster.errors import CommitConflict, RecordLogCorrupt
from cluster.host.fsync import sync_folder
from cluster.ledger.database import is_shared
from cluster.records.columns import SEGMENT, to_row
from cluster.records.contents import (
    READERS,
    StoredSegment,
    list_shared,
    load_ahead,
    segment_class,
    segment_records,
)
from cluster.records.location import AnyLog, LogLocation, local_node, location_of
from cluster.records.segments import UNFINISHED, list_segments
from cluster.records.table import FOLDER, HISTORY, LogTable
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.store import KeyStore
from cluster.storage import file_system, is_uri, list_files, read_bytes, remove, write_bytes

LOCK = ".compaction"
ADOPTING = "_adopting"
"""Folder in a shared table with one list for each node whose local table is being copied: the paths of its files."""
ADOPTED_FOLDER = "table.adopted"
"""Folder of a local table whose files are in the shared table. It is being removed."""
MAX_RECORDS, MAX_BYTES = 50_000, 32 * 2**20
"""Largest number of records, and of JSON bytes, in one file. Both limit the memory for writing and reading a file."""
MAX_SEGMENTS = 500
"""Largest number of segments that one run moves. All of them are open files during the run."""
ABANDONED_S = 3600.0
"""Age in seconds after which an unfinished segment file, or a remote file without a transaction, is removed. Its writer
must have been killed."""


def compact(log: AnyLog, *, store: KeyStore, files: ProtectedFiles) -> int:
    """Move closed segments into the log's table, and return the number of segments that were deleted.

    If it is 0, no closed segment was left.

    Args:
        log: The log.
        store: Key store to decrypt the segments.
        files: Writer of the table's encrypted files, with the same keys.

    Raises:
        CommitConflict: Another compaction of the log runs.
        RecordLogCorrupt: A segment was changed, or a part of the table's history is lost. Nothing was moved.
        AccessDenied, KeyRevoked, KeyNotFound: The key store refuses a key.
    """
    location = location_of(log)
    if location.shared is None and not location.folder.is_dir():
        return 0
    with contextlib.ExitStack() as locks:
        lock = _CompactionLock(location, locks)
        closed = list(itertools.islice(_closed_segments(location, locks), MAX_SEGMENTS))
        table = LogTable(location.root)
        _remove_leftovers(location, table)
        if new_segments := [segment for segment in closed if not table.has(segment.name)]:
            _move(new_segments, table, lock, store=store, files=files)
        if closed:
            table.sync()  # always, because a killed run may have committed without a sync
        for segment in closed:
            remove(segment.uri)
        return len(closed)


def adopt_local_table(location: LogLocation) -> None:
    """Move the table that an older release kept on this machine's disk into the shared one. It needs no key.

    Files and segments are added in one transaction, so a second call after a kill adds nothing twice. Then the folder
    is renamed before it is removed, because half of a table could not be opened. Segments of the log must be uploaded
    after this call only.

    Raises:
        CommitConflict: A compaction of the log runs.
        RecordLogCorrupt: The table's history is lost.
    """
    folder, adopted = location.folder / FOLDER, location.folder / ADOPTED_FOLDER
    if location.shared is None or not (folder.exists() or adopted.exists()):
        return
    with contextlib.ExitStack() as locks:
        lock = _CompactionLock(location, locks)
        if adopted.exists():
            shutil.rmtree(adopted)
        if not folder.exists():
            return
        local, shared = LogTable(location.folder), LogTable(location.root)
        marker = f"{shared.uri}/{ADOPTING}/{local_node(str(location.folder.parents[1]))}.json"
        segments = {name for file in local.files for name in _segments_of(f"{local.uri}/{file.path}")}
        if new := sorted(name for name in segments if not shared.has(name)):
            shared.ensure()
            write_bytes(marker, json.dumps([file.path for file in local.files]).encode())
            for file in local.files:
                write_bytes(f"{shared.uri}/{file.path}", read_bytes(f"{local.uri}/{file.path}"))
            lock.require()
            shared.commit(local.files, new)
        remove(marker)
        folder.rename(adopted)
        sync_folder(location.folder)
        shutil.rmtree(adopted)


class _CompactionLock:
    """Keeps another compaction of a log from running."""

    def __init__(self, location: LogLocation, locks: contextlib.ExitStack) -> None:
        """Take the lock until the stack ends.

        Raises:
            CommitConflict: Another compaction holds it.
        """
        self._name, self._database = location.name, None
        location.folder.mkdir(parents=True, exist_ok=True)
        taken = _locked(location.folder / LOCK, locks, flags=os.O_CREAT | os.O_RDWR)
        if taken and location.engine is not None and is_shared(location.engine):
            self._database = locks.enter_context(location.engine.connect())
            key = sa.func.hashtextextended(f"falaj compaction {location.root}", 0)
            taken = bool(self._database.execute(sa.select(sa.func.pg_try_advisory_xact_lock(key))).scalar())
        if not taken:
            raise CommitConflict(
                f"Another compaction of {location.root} is running. Wait until it has ended."
            )

    def require(self) -> None:
        """Require that the lock is still held: PostgreSQL releases it if the connection breaks.

        Raises:
            CommitConflict: The lock is lost.
        """
        try:
            if self._database is not None:
                self._database.execute(sa.select(1))
        except sa.exc.DBAPIError as error:
            raise CommitConflict(
                f"The connection to the ledger's database broke during the compaction of {self._name}. Nothing was "
                "moved. Run it again."
            ) from error


def _closed_segments(location: LogLocation, locks: contextlib.ExitStack) -> Iterator[StoredSegment]:
    """Yield the segments that get no more records: uploaded ones, or on this disk those that it can lock."""
    if location.shared is not None:
        yield from list_shared(location)
        return
    for path in list_segments(location.folder):
        if _locked(path, locks, flags=os.O_RDONLY):
            yield StoredSegment(log=location.name, name=path.stem, uri=str(path))


def _move(
    segments: Sequence[StoredSegment],
    table: LogTable,
    lock: _CompactionLock,
    *,
    store: KeyStore,
    files: ProtectedFiles,
) -> None:
    """Write and commit the records of segments."""
    table.ensure()
    loaded = load_ahead(segments, StoredSegment.loaded, threads=READERS if is_uri(table.uri) else 1)
    written = [
        table.write(rows, column_class, files)
        for column_class, rows in _row_groups(table.kind, loaded, store)
    ]
    table.sync_files(written)
    lock.require()
    table.commit(written, [segment.name for segment in segments])


def _row_groups(
    kind: str, segments: Iterable[StoredSegment], store: KeyStore
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the column class and the rows of each file to write, with the records of all segments."""
    by_class: dict[str, _Rows] = {}
    for segment in segments:
        if (column_class := segment_class(segment)) is None:
            continue
        for line, record in enumerate(segment_records(segment, store)):
            group = by_class.setdefault(column_class, _Rows())
            group.add(to_row(kind, segment.name, line, record))
            if len(group.rows) >= MAX_RECORDS or group.size >= MAX_BYTES:
                yield column_class, by_class.pop(column_class).rows
    for column_class, group in by_class.items():
        yield column_class, group.rows


@dataclass(kw_only=True, slots=True)
class _Rows:
    """Rows that will be one file."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0
    """Bytes of their texts."""

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.size += sum(len(value) for value in row.values() if isinstance(value, str))


def _remove_leftovers(location: LogLocation, table: LogTable) -> None:
    """Remove files that a killed compaction wrote but did not commit, and segments that a killed writer did not finish.

    This is safe: the caller holds the compaction's lock, and no reader opens such files. A remote file must be old too,
    because a compaction that has lost its lock may still have to notice that. Files of a node that was killed while it
    copied its local table stay: only that node has their records elsewhere, and it will commit them.
    """
    leftovers = table.uncommitted_files()
    if is_uri(table.uri) and leftovers:
        lists = [json.loads(read_bytes(uri)) for uri in list_files(f"{table.uri}/{ADOPTING}", ".json")]
        adopting = {f"{table.uri}/{path}" for paths in lists for path in paths}
        leftovers = [uri for uri in leftovers if uri not in adopting]
        fs, _ = file_system(table.uri)
        leftovers = [uri for uri in leftovers if fs.modified(uri).timestamp() < time.time() - ABANDONED_S]
    if leftovers:
        existing = {path.stem for path in list_segments(location.folder)}
        existing |= {segment.name for segment in list_shared(location)}
        for uri in leftovers:
            if uri.endswith(".parquet"):
                _require_other_copy(uri, existing, table)
    for uri in leftovers:
        remove(uri)
    remove_unfinished(location.folder)


def remove_unfinished(folder: Path) -> None:
    """Remove segments whose writer was killed before they had their first line."""
    for path in folder.glob(f"*{UNFINISHED}"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - ABANDONED_S:
                path.unlink()


def _require_other_copy(uri: str, existing: Container[str], table: LogTable) -> None:
    """Require that another copy of a file's records exists."""
    if lost := sorted(name for name in _segments_of(uri) if name not in existing and not table.has(name)):
        raise RecordLogCorrupt(
            f"{uri} holds records of segment {lost[0]}, which does not exist and which the table does not name: a "
            f"part of the table's history is lost. Nothing was changed. Restore {table.uri}/{HISTORY} from a backup."
        )


def _segments_of(uri: str) -> set[str]:
    """Return the names of the segments whose records a file holds. They are public."""
    fs, path = file_system(uri)
    with fs.open(path, "rb") as file:
        return set(pq.ParquetFile(file).read([SEGMENT]).column(SEGMENT).to_pylist())


def _locked(path: Path, locks: contextlib.ExitStack, *, flags: int) -> bool:
    """Lock a file until the stack ends; return False if another process holds the lock."""
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    locks.callback(os.close, descriptor)
    return True
