"""Segments: the files that records are appended to, each written by one process alone.

A record is one line, appended with one write. Once `append` has returned the line is the kernel's, so kill -9 of the
process loses nothing; a power cut may lose the last seconds, unless `sync` was called too. A line cut short belongs to
an answer that never left, and is passed over.

A segment's first line names its key and holds its data key, wrapped; every other line is a record as JSON, encrypted
(AES-256-GCM) and bound to its log, segment and number, so that none can be altered, moved or left out of the middle
unseen. That the last ones are missing shows only against the edge's access records. Whoever writes needs to wrap only,
so a replica cannot read what others have logged. How many records there are can be counted without a key.

A writer holds its segment locked (flock) and leaves it for a new one when it is large or old. A segment that nobody
holds gets no more records: that is how compaction tells what it may take, without asking any replica.
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
from cluster.records.schema import Record
from cluster.security.encryption.envelope import ValueCipher, place_of
from cluster.security.keys.store import COLUMN_CLASSES, KeyStore
from cluster.synced import sync_folder

SUFFIX = ".records"
UNBORN = ".new"
"""Of a segment whose first line is being written."""
MAX_BYTES = 64 * 2**20
MAX_AGE_S = 3600.0


class SegmentWriter:
    """Appends records to segments of this process alone, one after another."""

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
            folder: the log, `predictions/<model>` or `outcomes/<model>`.
            store: wraps the data key of this writer's segments, once.
            key: what it is wrapped under.
            keep_unsynced: have `sync` cover segments that were left for a new one, too.
            max_bytes: of a segment, beyond which a new one is begun.
            max_age_s: of a segment, beyond which the next record begins a new one.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
            OSError: the disk is full or failed.
        """
        self._folder = folder
        self._cipher, wrapped = ValueCipher.create(store, key)
        self._header = orjson.dumps({"key": key, "data_key": wrapped}) + b"\n"
        self._keep_unsynced = keep_unsynced
        self._max_bytes, self._max_age_s = max_bytes, max_age_s
        self._left: list[_Segment] = []
        self._segment = _Segment(folder, self._header, synced=keep_unsynced)

    @property
    def path(self) -> Path:
        """Of the segment that is written now."""
        return self._segment.path

    def append(self, *records: Record) -> None:
        """Write records, all or none of them readable.

        Raises:
            OSError: the disk is full or failed; the next append starts a clean line.
        """
        segment = self._segment
        if segment.broken or (segment.count and self._is_full(segment)):
            segment = self._next()
        place, count = segment.place, segment.count
        lines = [
            base64.b64encode(
                self._cipher.encrypt(
                    orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY), place_of(place, b"%d" % number)
                )
            )
            + b"\n"
            for number, record in enumerate(records, start=count)
        ]
        segment.write(b"".join(lines))
        segment.count = count + len(records)

    def leave_if_old(self) -> None:
        """Let go of the segment if it is old, without waiting for a record to do so; the next one begins a new
        segment. For moments in which no `sync` runs.

        Raises:
            OSError: as `sync`.
        """
        segment = self._segment
        if segment.count and self._is_full(segment):
            if self._keep_unsynced:
                segment.sync()
            segment.close()

    def sync(self) -> None:
        """Have all records that were appended before this call on the disk; may run beside `append`, but only once at
        a time.

        Raises:
            OSError: the disk failed. What was not synced may be lost, even where a later call succeeds: whoever waits
                for it must be told so now, and the segment gets no more records.
        """
        segment = self._segment  # before the others: what is left in between is then among them
        for one in self._left.copy():
            self._left.remove(one)
            with contextlib.closing(one):
                one.sync()
        segment.sync()

    def close(self) -> None:
        """Let go of the segment, so that it can be compacted."""
        for one in (*self._left, self._segment):
            one.close()
        self._left.clear()

    def _is_full(self, segment: _Segment) -> bool:
        return segment.size >= self._max_bytes or time.monotonic() - segment.began >= self._max_age_s

    def _next(self) -> _Segment:
        before, self._segment = (
            self._segment,
            _Segment(self._folder, self._header, synced=self._keep_unsynced),
        )
        if self._keep_unsynced and not before.lossy:
            self._left.append(before)
        else:
            before.close()
        return self._segment


class _Segment:
    """One file, locked as long as it is open."""

    def __init__(self, folder: Path, header: bytes, *, synced: bool) -> None:
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}"
        self.path = folder / f"{name}{SUFFIX}"
        self.place = segment_place(self.path)
        self.count, self.size = 0, 0
        self.began = time.monotonic()
        self.broken = self.closed = False
        self.lossy = False
        """A sync failed: the kernel may have forgotten records, and would not say so again."""
        _make_folder(folder, synced=synced)
        unborn = folder / f"{name}{UNBORN}"
        self._descriptor = os.open(unborn, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Nobody sees the file by its name before it is locked and has its first line.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            self.write(header)
            if synced:
                self.sync()
            unborn.rename(self.path)
            if synced:
                sync_folder(folder)
        except BaseException:
            self.close()
            for path in (unborn, self.path):
                path.unlink(missing_ok=True)
            raise

    def write(self, data: bytes) -> None:
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            self._cut()
            raise
        if written != len(data):
            self._cut()
            said = f"the disk took {written} of {len(data)} bytes"
            raise OSError(errno.ENOSPC, said, str(self.path))
        self.size += written

    def _cut(self) -> None:
        """Take away what was written in part; where even that fails, no line may follow it."""
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
            self.closed = self.broken = True  # its number may soon be another file's
            os.close(self._descriptor)


def _make_folder(folder: Path, *, synced: bool) -> None:
    if not synced:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        _make_folder(folder.parent, synced=True)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def segments(folder: Path) -> list[Path]:
    """A log's segments, in the order of their beginning."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def segment_records(path: Path, store: KeyStore) -> Iterator[dict[str, Any]]:
    """All whole records of a segment.

    Raises:
        RecordLogCorrupt: a record was altered, moved or taken out, or the segment is under a key that is none of its
            log's, naming file and line.
        AccessDenied, KeyRevoked: as the key store says.
        FileNotFoundError: there is no such segment.
    """
    with path.open("rb") as file:
        header = file.readline()
        if not header.endswith(b"\n"):
            return
        cipher, place = ValueCipher.open(store, *_stated(path, header)), segment_place(path)
        for number, line in enumerate(file):
            if line.endswith(b"\n"):
                yield _record(path, number, line, cipher, place)


def count_segment(path: Path) -> int:
    """The number of whole records of a segment; needs no key.

    Raises:
        FileNotFoundError: there is no such segment.
    """
    with path.open("rb") as file:
        return max(sum(line.endswith(b"\n") for line in file) - 1, 0)


def segment_class(path: Path) -> str | None:
    """The class of a segment's key; none where not even its first line is whole, so that it holds nothing.

    Raises:
        RecordLogCorrupt: the key is none of the log's.
    """
    with path.open("rb") as file:
        header = file.readline()
    return _stated(path, header)[0].rpartition("/")[2] if header.endswith(b"\n") else None


def _stated(path: Path, header: bytes) -> tuple[str, str]:
    """A segment's key and its wrapped data key."""
    try:
        stated = orjson.loads(header)
        key, wrapped = stated["key"], stated["data_key"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise RecordLogCorrupt(f"{path}: the first line was altered. Restore it from a backup.") from error
    if not _is_of_this_log(path, key):
        raise RecordLogCorrupt(
            f"{path}: it says that it is under key {key!r}, which is none of this log's. Restore it from a backup."
        )
    return key, wrapped


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


def segment_place(path: Path) -> str:
    """What records are bound to besides their number: their log, `predictions/<model>`, and segment."""
    return "/".join(path.parts[-3:])
