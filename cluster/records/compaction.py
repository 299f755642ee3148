"""Move segments into a log's table, exactly once.

A segment can be moved when its writer has closed it or has ended, because then its lock is free. Its records are
written to encrypted files. One Delta transaction adds these files and names the segment. The segment is deleted only
when that transaction is on disk.

If a compaction is killed before the transaction, files remain that no transaction refers to. If it is killed after the
transaction, segments remain whose records are already in the table; readers skip these segments. The next run removes
such files and segments. But it removes a file only if the file's records also exist elsewhere. If they do not, the
table that contained the file was lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.errors import CommitConflict, RecordLogCorrupt
from cluster.fsync import sync_folder
from cluster.records.columns import SEGMENT, to_row
from cluster.records.segments import UNFINISHED, list_segments, segment_class, segment_records
from cluster.records.table import CLASS, HISTORY, LogTable
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.store import KeyStore

LOCK = ".compaction"
MAX_RECORDS, MAX_BYTES = 50_000, 32 * 2**20
"""Largest number of records, and of JSON bytes, in one file. Both limit the memory for writing and reading a file."""
MAX_SEGMENTS = 500
"""Largest number of segments that one run moves. All of them are open files during the run."""
ABANDONED_S = 3600.0
"""Age in seconds after which an unfinished segment file is removed, because its writer must have been killed."""


def compact(log: Path, *, store: KeyStore, files: ProtectedFiles) -> int:
    """Move closed segments into the log's table, and return the number of segments that were deleted.

    If it is 0, no closed segment was left.

    Args:
        log: Folder of the log.
        store: Key store to decrypt the segments.
        files: Writer of the table's encrypted files, with the same keys.

    Raises:
        CommitConflict: Another compaction of the log runs.
        RecordLogCorrupt: A segment was changed, or a part of the table's history is lost. Nothing was moved.
        AccessDenied, KeyRevoked, KeyNotFound: The key store refuses a key.
    """
    if not log.is_dir():
        return 0
    with contextlib.ExitStack() as locks:
        if not _locked(log / LOCK, locks, flags=os.O_CREAT | os.O_RDWR):
            raise CommitConflict(f"Another compaction of {log} is running. Wait until it has ended.")
        unlocked = (path for path in list_segments(log) if _locked(path, locks, flags=os.O_RDONLY))
        closed = list(itertools.islice(unlocked, MAX_SEGMENTS))
        table = LogTable(log)
        _remove_leftovers(log, table)
        if new_segments := [path for path in closed if not table.has(path.stem)]:
            _move(new_segments, table, store=store, files=files)
        if closed:
            table.sync()  # always, because a killed run may have committed without a sync
        for path in closed:
            path.unlink()
        return len(closed)


def _move(paths: Sequence[Path], table: LogTable, *, store: KeyStore, files: ProtectedFiles) -> None:
    """Write and commit the records of segments."""
    table.ensure()
    written = [
        table.write(rows, column_class, files) for column_class, rows in _row_groups(table.kind, paths, store)
    ]
    for folder in {(table.folder / file.path).parent for file in written} | {table.folder}:
        sync_folder(folder)  # if the commit survives a power cut, its files must survive too
    table.commit(written, [path.stem for path in paths])


def _row_groups(
    kind: str, paths: Sequence[Path], store: KeyStore
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the column class and the rows of each file to write, with the records of all segments."""
    by_class: dict[str, list[Path]] = {}
    for path in paths:
        if (column_class := segment_class(path)) is not None:
            by_class.setdefault(column_class, []).append(path)
    for column_class, group in by_class.items():
        rows: list[dict[str, Any]] = []
        size = 0
        for path in group:
            for line, record in enumerate(segment_records(path, store)):
                rows.append(to_row(kind, path.stem, line, record))
                size += sum(len(value) for value in rows[-1].values() if isinstance(value, str))
                if len(rows) >= MAX_RECORDS or size >= MAX_BYTES:
                    yield column_class, rows
                    rows, size = [], 0
        if rows:
            yield column_class, rows


def _remove_leftovers(log: Path, table: LogTable) -> None:
    """Remove files that a killed compaction wrote but did not commit, and segments that a killed writer did not finish.

    This is safe: the caller holds the compaction's lock, and no reader opens such files.
    """
    committed = {file.path for file in table.files}
    existing = {path.stem for path in list_segments(log)}
    files = table.folder.glob(f"{CLASS}=*/*.parquet*")
    leftovers = [path for path in files if str(path.relative_to(table.folder)) not in committed]
    for path in leftovers:
        if path.suffix == ".parquet":
            _require_other_copy(path, existing, table)
    for path in leftovers:
        path.unlink()
    for path in log.glob(f"*{UNFINISHED}"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - ABANDONED_S:
                path.unlink()


def _require_other_copy(path: Path, existing: Container[str], table: LogTable) -> None:
    """Require that another copy of a file's records exists."""
    names = set(pq.ParquetFile(path).read([SEGMENT]).column(SEGMENT).to_pylist())
    if lost := sorted(name for name in names if name not in existing and not table.has(name)):
        raise RecordLogCorrupt(
            f"{path} holds records of segment {lost[0]}, which does not exist and which the table does not name: a "
            f"part of the table's history is lost. Nothing was changed. Restore {table.folder / HISTORY} from a backup."
        )


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
