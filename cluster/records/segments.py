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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from cluster.host.fsync import sync_folder
from cluster.records.blocks import Block
from cluster.records.location import MAX_AGE_S
from cluster.records.schema import Record
from cluster.security.encryption.envelope import ValueCipher, value_aad
from cluster.security.keys.store import KeyStore

SUFFIX = ".records"
UNFINISHED = ".new"
"""Suffix of a segment while its first line is being written."""
MAX_BYTES = 64 * 2**20


class SegmentWriter:
    """Appends records to segments that only this process writes."""

    def __init__(
        self,
        folder: Path,
        *,
        store: KeyStore,
        key: str,
        keep_unsynced: bool = False,
        keep_blocks: bool = False,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        """Start a segment.

        Args:
            folder: Folder of the log, `predictions/<model>` or `outcomes/<model>`.
            store: Key store that wraps this writer's data key, once.
            key: Name of the key that wraps the data key.
            keep_unsynced: Keep full segments open until the next `sync`, so that `sync` flushes them too.
            keep_blocks: Keep new lines until the next `take_blocks`, and full segments open until the result is closed.
            max_bytes: Size of a segment after which the next record starts a new segment.
            max_age_s: Age of a segment, in seconds, after which the next record starts a new segment.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied: The key store refuses the key.
            OSError: The disk is full or failed.
        """
        self._folder = folder
        self._cipher, wrapped = ValueCipher.create(store, key)
        self._header = orjson.dumps({"key": key, "data_key": wrapped}) + b"\n"
        self._keep_unsynced, self._keep_blocks = keep_unsynced, keep_blocks
        self._blocks: list[Block] = []
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
        start, data = segment.size, b"".join(lines)
        segment.write(data)
        segment.count = count + len(records)
        if self._keep_blocks:
            self._blocks.append(
                Block(segment.path.stem, start, data)
                if count
                else Block(segment.path.stem, 0, self._header + data)
            )

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

    def take_blocks(self) -> TakenBlocks:
        """Return all lines that were appended since the last call. The caller must close the result."""
        blocks, self._blocks = self._blocks, []
        full, self._unsynced = self._unsynced, []
        return TakenBlocks(blocks=_joined(blocks), full_segments=full)

    def drop_blocks(self) -> None:
        """Drop what `take_blocks` would return, and let the segment get no more records: its blocks have a gap."""
        self.take_blocks().close()
        self._segment.broken = self._segment.lossy = True

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
        if (self._keep_unsynced or self._keep_blocks) and not previous.lossy:
            self._unsynced.append(previous)
        else:
            previous.close()
        return self._segment


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenBlocks:
    """New lines of a writer's segments."""

    blocks: list[Block]
    """At most one for each segment, in the order of writing."""
    full_segments: list[_Segment]

    def close(self) -> None:
        """Close the full segments, after their blocks were added or lost."""
        for segment in self.full_segments:
            segment.close()


def _joined(blocks: Sequence[Block]) -> list[Block]:
    """Join the blocks of each segment, which follow each other."""
    by_segment: dict[str, list[Block]] = {}
    for block in blocks:
        by_segment.setdefault(block.segment, []).append(block)
    return [
        Block(name, parts[0].start, b"".join(part.content for part in parts))
        for name, parts in by_segment.items()
    ]


class _Segment:
    """One segment file, locked while it is open."""

    def __init__(self, folder: Path, header: bytes, *, synced: bool) -> None:
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:12]}"
        self.path = folder / f"{name}{SUFFIX}"
        self.aad = segment_aad("/".join(folder.parts[-2:]), name)
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


def segment_aad(log: str, name: str) -> str:
    """Return the first part of the AAD of a segment's records: the log, `predictions/<model>`, and the segment's file.

    The record's number is the other part.
    """
    return f"{log}/{name}{SUFFIX}"


def list_segments(folder: Path) -> list[Path]:
    """Return the paths of a log's segments, oldest first."""
    return sorted(folder.glob(f"*{SUFFIX}"))
