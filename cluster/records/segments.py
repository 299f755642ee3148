"""Segments: files that records are appended to. Each segment has one writing process.

A record is one line, appended with one write. When `append` returns, the kernel has the line, so kill -9 of the process
loses nothing. A power cut can lose the last seconds, unless `sync` was called too. Readers skip an incomplete line,
because its answer was never sent.

A segment's first line has the name of its key, and its wrapped data key. Every other line is a record: JSON, encrypted
with AES-256-GCM and bound to its log, segment and number. So a record that was changed, moved, or removed from the
middle is detected. If the last records were removed, only the edge's access records reveal it. Writers only need
permission to wrap keys, so a replica cannot read logged records. Counting records needs no key.

A writer holds its segment's lock (flock), and starts a new segment when the current segment is large or old. A segment
without a lock gets no more records. So compaction can find closed segments without contacting any replica.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from cluster.errors import ArtifactTampered, RecordLogCorrupt
from cluster.fsync import sync_folder
from cluster.records.schema import Record
from cluster.security.encryption.envelope import ValueCipher, value_aad
from cluster.security.keys.store import COLUMN_CLASSES, KeyStore

SUFFIX = ".records"
UNFINISHED = ".new"
"""Suffix of a segment while its first line is being written."""
MAX_BYTES = 64 * 2**20
MAX_AGE_S = 3600.0


class SegmentWriter:
    """Appends records to segments that only this process writes."""

    def __init__(
        self,
        folder: Path,
        *,
        store: KeyStore,
        key: str,
        keep_unsynced: bool = False,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        """Start a segment.

        Args:
            folder: Folder of the log, `predictions/<model>` or `outcomes/<model>`.
            store: Key store that wraps this writer's data key, once.
            key: Name of the key that wraps the data key.
            keep_unsynced: Keep full segments open until the next `sync`, so that `sync` flushes them too.
            max_bytes: Size of a segment after which the next record starts a new segment.
            max_age_s: Age of a segment, in seconds, after which the next record starts a new segment.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: The key store refuses the key.
            OSError: The disk is full or failed.
        """
        self._folder = folder
        self._cipher, wrapped = ValueCipher.create(store, key)
        self._header = orjson.dumps({"key": key, "data_key": wrapped}) + b"\n"
        self._keep_unsynced = keep_unsynced
        self._max_bytes, self._max_age_s = max_bytes, max_age_s
        self._unsynced: list[_Segment] = []
        self._segment = _Segment(folder, self._header, synced=keep_unsynced)

    @property
    def path(self) -> Path:
        """Path of the current segment."""
        return self._segment.path

    def append(self, *records: Record) -> None:
        """Write records. Afterwards, either all of them are readable or none.

        Raises:
            OSError: The disk is full or failed. The next append starts on a new line.
        """
        segment = self._segment
        if segment.broken or (segment.count and self._is_full(segment)):
            segment = self._start_next()
        aad, count = segment.aad, segment.count
        lines = [
            base64.b64encode(
                self._cipher.encrypt(
                    orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY), value_aad(aad, b"%d" % number)
                )
            )
            + b"\n"
            for number, record in enumerate(records, start=count)
        ]
        segment.write(b"".join(lines))
        segment.count = count + len(records)

    def close_if_old(self) -> None:
        """Close the segment if it is old or large. The next record starts a new segment.

        It must not run at the same time as `sync`.

        Raises:
            OSError: The disk failed; see `sync`.
        """
        segment = self._segment
        if segment.count and self._is_full(segment):
            if self._keep_unsynced:
                segment.sync()
            segment.close()

    def sync(self) -> None:
        """Flush all records that were appended before this call to disk.

        It can run at the same time as `append`, but not at the same time as another `sync`.

        Raises:
            OSError: The disk failed. Unsynced records may be lost, even if a later call succeeds. So the caller must
                report the failure now, and the segment gets no more records.
        """
        current = self._segment  # read first, so that it is synced even if `append` replaces it now
        for segment in self._unsynced.copy():
            self._unsynced.remove(segment)
            with contextlib.closing(segment):
                segment.sync()
        current.sync()

    def close(self) -> None:
        """Close all segments, so that they can be compacted."""
        for segment in (*self._unsynced, self._segment):
            segment.close()
        self._unsynced.clear()

    def _is_full(self, segment: _Segment) -> bool:
        return segment.size >= self._max_bytes or time.monotonic() - segment.started_at >= self._max_age_s

    def _start_next(self) -> _Segment:
        previous, self._segment = (
            self._segment,
            _Segment(self._folder, self._header, synced=self._keep_unsynced),
        )
        if self._keep_unsynced and not previous.lossy:
            self._unsynced.append(previous)
        else:
            previous.close()
        return self._segment


class _Segment:
    """One segment file, locked while it is open."""

    def __init__(self, folder: Path, header: bytes, *, synced: bool) -> None:
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}"
        self.path = folder / f"{name}{SUFFIX}"
        self.aad = segment_aad(self.path)
        self.count, self.size = 0, 0
        self.started_at = time.monotonic()
        self.broken = self.closed = False
        """A broken segment takes no more records."""
        self.lossy = False
        """Whether a sync failed. The kernel may have dropped records, and a later sync would not report the loss."""
        _make_folder(folder, synced=synced)
        unfinished = folder / f"{name}{UNFINISHED}"
        self._descriptor = os.open(unfinished, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # The file gets its final name only when it is locked and has its first line.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self.write(header)
            if synced:
                self.sync()
            unfinished.rename(self.path)
            if synced:
                sync_folder(folder)
        except BaseException:
            self.close()
            for path in (unfinished, self.path):
                path.unlink(missing_ok=True)
            raise

    def write(self, data: bytes) -> None:
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            self._truncate()
            raise
        if written != len(data):
            self._truncate()
            message = f"the disk took {written} of {len(data)} bytes"
            raise OSError(errno.ENOSPC, message, str(self.path))
        self.size += written

    def _truncate(self) -> None:
        """Remove a partly written line. If that fails, the segment takes no more lines."""
        try:
            os.ftruncate(self._descriptor, self.size)
        except OSError:
            self.broken = True
            raise

    def sync(self) -> None:
        if self.closed:
            return
        if self.lossy:
            raise OSError(errno.EIO, "an earlier sync failed", str(self.path))
        try:
            os.fdatasync(self._descriptor)
        except OSError:
            self.broken = self.lossy = True
            raise

    def close(self) -> None:
        if not self.closed:
            self.closed = self.broken = True  # the descriptor's number may soon belong to another file
            os.close(self._descriptor)


def _make_folder(folder: Path, *, synced: bool) -> None:
    if not synced:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        _make_folder(folder.parent, synced=True)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def list_segments(folder: Path) -> list[Path]:
    """Return the paths of a log's segments, oldest first."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def segment_records(path: Path, store: KeyStore) -> Iterator[dict[str, Any]]:
    """Yield all complete records of a segment.

    Raises:
        RecordLogCorrupt: A record was changed, moved or removed, or the segment's key does not belong to its log. The
            message names file and line.
        AccessDenied, KeyRevoked: The key store refuses the key.
        FileNotFoundError: The segment does not exist.
    """
    with path.open("rb") as file:
        header = file.readline()
        if not header.endswith(b"\n"):
            return
        cipher, aad = ValueCipher.open(store, *_parse_header(path, header)), segment_aad(path)
        for number, line in enumerate(file):
            if line.endswith(b"\n"):
                yield _record(path, number, line, cipher, aad)


def count_segment(path: Path) -> int:
    """Return the number of complete records of a segment. No key is needed.

    Raises:
        FileNotFoundError: The segment does not exist.
    """
    with path.open("rb") as file:
        return max(sum(line.endswith(b"\n") for line in file) - 1, 0)


def segment_class(path: Path) -> str | None:
    """Return the column class of a segment's key, or None if the first line is incomplete and there are no records.

    Raises:
        RecordLogCorrupt: The key does not belong to the log.
    """
    with path.open("rb") as file:
        header = file.readline()
    return _parse_header(path, header)[0].rpartition("/")[2] if header.endswith(b"\n") else None


def _parse_header(path: Path, header: bytes) -> tuple[str, str]:
    """Parse a segment's first line, and return the name of the wrapping key and the wrapped data key."""
    try:
        content = orjson.loads(header)
        key, wrapped = content["key"], content["data_key"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise RecordLogCorrupt(f"{path}: the first line was changed. Restore it from a backup.") from error
    if not _belongs_to_log(path, key):
        raise RecordLogCorrupt(
            f"{path}: its key {key!r} does not belong to this log. Restore the file from a backup."
        )
    return key, wrapped


def _belongs_to_log(path: Path, key: object) -> bool:
    """Return whether a key belongs to the segment's log: `predictions/<model>/<class>` for `predictions/<model>`.

    The segment's first line names the key. Without this check, a principal with another key could add forged records.
    """
    log, _, column_class = str(key).rpartition("/")
    return isinstance(key, str) and log == "/".join(path.parts[-3:-1]) and column_class in COLUMN_CLASSES


def _record(path: Path, number: int, line: bytes, cipher: ValueCipher, aad: str) -> dict[str, Any]:
    try:
        data = cipher.decrypt(base64.b64decode(line[:-1], validate=True), value_aad(aad, b"%d" % number))
    except (ArtifactTampered, ValueError) as error:
        raise RecordLogCorrupt(
            f"{path}, line {number + 2}: the record was changed, or an earlier one was removed. "
            "Restore the file from a backup."
        ) from error
    return dict(orjson.loads(data))


def segment_aad(path: Path) -> str:
    """Return the first part of the AAD of a segment's records: the log, `predictions/<model>`, and the segment.

    The record's number is the other part.
    """
    return "/".join(path.parts[-3:])
