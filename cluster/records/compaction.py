"""Taking segments into a log's table, exactly once.

A segment is taken when its writer has left it or has ended: nobody holds its lock then. Its records are written to
protected files, one Delta transaction adds these and names the segment, and only when that is on the disk is the
segment deleted. Killed before the transaction, a compaction leaves files that nothing refers to; killed after it,
segments whose records are in the table, which every reader passes over. The next run removes both. A file that nothing
refers to is removed only while its records are somewhere else: else it is what is left of a table.
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
from cluster.records.columns import SEGMENT, to_row
from cluster.records.segments import UNBORN, segment_class, segment_records, segments
from cluster.records.table import CLASS, HISTORY, LogTable
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.store import KeyStore
from cluster.synced import sync_folder

LOCK = ".compaction"
MAX_RECORDS, MAX_BYTES = 50_000, 32 * 2**20
"""Of one file, as JSON: they bound the memory it takes to write and to read it."""
MAX_SEGMENTS = 500
"""Of one run: each is held open."""
ABANDONED_S = 3600.0


def compact(log: Path, *, store: KeyStore, files: ProtectedFiles) -> int:
    """Take segments that get no more records into the log's table; gives how many are gone from the log for that, so
    that 0 means that none is left.

    Args:
        log: its folder.
        store: opens the segments.
        files: writes the table's files, with the same keys.

    Raises:
        CommitConflict: another compaction of the log runs.
        RecordLogCorrupt: a segment was altered, or a part of the table's history is lost; nothing was taken.
        AccessDenied, KeyRevoked, KeyNotFound: as the key store says.
    """
    if not log.is_dir():
        return 0
    with contextlib.ExitStack() as locks:
        if not _locked(log / LOCK, locks, flags=os.O_CREAT | os.O_RDWR):
            raise CommitConflict(f"Another compaction of {log} runs. Wait for its end.")
        unheld = (path for path in segments(log) if _locked(path, locks, flags=os.O_RDONLY))
        ended = list(itertools.islice(unheld, MAX_SEGMENTS))
        table = LogTable(log)
        _remove_leftovers(log, table)
        if wanted := [path for path in ended if not table.has(path.stem)]:
            _take(wanted, table, store=store, files=files)
        if ended:
            table.sync()  # here, because a run that was killed may have committed without it
        for path in ended:
            path.unlink()
        return len(ended)


def _take(paths: Sequence[Path], table: LogTable, *, store: KeyStore, files: ProtectedFiles) -> None:
    """Commit segments' records."""
    table.ensure()
    written = [
        table.write(rows, column_class, files) for column_class, rows in _pieces(table.kind, paths, store)
    ]
    for folder in {(table.folder / file.path).parent for file in written} | {table.folder}:
        sync_folder(folder)  # what is committed must be there, also if only the commit outlives a power cut
    table.commit(written, [path.stem for path in paths])


def _pieces(kind: str, paths: Sequence[Path], store: KeyStore) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The segments' records as rows of one class each, no more at a time than a file should hold."""
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
    """Files that a killed compaction did not get to commit, and segments whose writer was killed before their first
    line. Nobody else compacts now, and nobody reads them."""
    known = {file.path for file in table.files}
    there = {path.stem for path in segments(log)}
    found = table.folder.glob(f"{CLASS}=*/*.parquet*")
    leftovers = [path for path in found if str(path.relative_to(table.folder)) not in known]
    for path in leftovers:
        if path.suffix == ".parquet":
            _check_is_elsewhere(path, there, table)
    for path in leftovers:
        path.unlink()
    for path in log.glob(f"*{UNBORN}"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - ABANDONED_S:
                path.unlink()


def _check_is_elsewhere(path: Path, there: Container[str], table: LogTable) -> None:
    """Refuse to take the last copy of records for a leftover."""
    held = set(pq.ParquetFile(path).read([SEGMENT]).column(SEGMENT).to_pylist())
    if lost := sorted(one for one in held if one not in there and not table.has(one)):
        raise RecordLogCorrupt(
            f"{path} holds records of segment {lost[0]}, which is gone and which the table does not name: a part of "
            f"its history is lost. Nothing was changed. Restore {table.folder / HISTORY} from a backup."
        )


def _locked(path: Path, locks: contextlib.ExitStack, *, flags: int) -> bool:
    """Hold a file's lock until the stack ends, if nobody else does."""
    descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    locks.callback(os.close, descriptor)
    return True
