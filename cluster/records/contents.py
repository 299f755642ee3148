"""Read the records of a segment: a file on this disk, an uploaded file, or the blocks in the ledger's database."""

from __future__ import annotations

import base64
import contextlib
import io
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import orjson

from cluster.errors import ArtifactTampered, RecordLogCorrupt
from cluster.records.blocks import read_blocks, segment_sizes
from cluster.records.location import LogLocation
from cluster.records.segments import SUFFIX, list_segments, segment_aad
from cluster.security.encryption.envelope import ValueCipher, value_aad
from cluster.security.keys.store import COLUMN_CLASSES, KeyStore
from cluster.storage import is_uri, list_files, read_bytes

T = TypeVar("T")
U = TypeVar("U")
READERS = 8
"""Uploaded segments that are read at the same time. Each takes its size in memory, 64 MiB at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSegment:
    """A segment that can be read."""

    log: str
    name: str
    uri: str
    """Path or URI of its file. Messages name it."""
    content: bytes | None = None
    """Its lines, if they were read already."""

    def open(self) -> BinaryIO:
        """Open its lines for reading.

        Raises:
            FileNotFoundError: The file does not exist.
        """
        if self.content is not None:
            return io.BytesIO(self.content)
        return io.BytesIO(read_bytes(self.uri)) if is_uri(self.uri) else Path(self.uri).open("rb")

    def loaded(self) -> StoredSegment:
        """Return the segment with its lines, if its file is remote. Raises as `open`."""
        return replace(self, content=read_bytes(self.uri)) if is_uri(self.uri) else self


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentListing:
    """All segments of a log at one moment, except those that are only in the table."""

    location: LogLocation
    names: tuple[str, ...]
    """Oldest first."""
    block_bytes: dict[str, int]
    """Size of the blocks of each segment that has any."""
    uploaded: frozenset[str] = frozenset()
    """Names of the uploaded segments."""

    def find(self, name: str) -> StoredSegment | None:
        """Return a listed segment where it is now; None if it is only in the table, or was moved during this call.

        A segment goes from the disk and the database to the shared folder, and from there to the table.
        """
        location = self.location
        path = location.folder / f"{name}{SUFFIX}"
        size = path.stat().st_size if path.exists() else None
        on_disk = None if size is None else StoredSegment(log=location.name, name=name, uri=str(path))
        if size is not None and size >= self.block_bytes.get(name, 0) and name not in self.uploaded:
            return on_disk
        if size is None or name in self.uploaded:
            shared = self._shared(name)
            if shared is not None and shared.content is not None:
                # After a power cut the file can be shorter than what another node uploaded from the database.
                return on_disk if size is not None and size > len(shared.content) else shared
        # Only the database has it, or after a power cut more lines of it than the file.
        if location.engine is not None and (content := read_blocks(location.engine, location.name, name)):
            uri = shared_uri(location, name) or str(path)
            return StoredSegment(log=location.name, name=name, uri=uri, content=content)
        return self._shared(name) or on_disk  # an upload may have removed the blocks during this call

    def _shared(self, name: str) -> StoredSegment | None:
        """Return an uploaded segment with its lines; None if it is not uploaded, or in the table already."""
        if (uri := shared_uri(self.location, name)) is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            return StoredSegment(log=self.location.name, name=name, uri=uri, content=read_bytes(uri))
        return None

    def find_all(self, names: Sequence[str]) -> Generator[StoredSegment | None]:
        """Yield the results of `find` for each name, in their order. Uploaded segments are read a few at a time."""
        return load_ahead(names, self._find_or_none, threads=1 if self.location.shared is None else READERS)

    def _find_or_none(self, name: str) -> StoredSegment | None:
        with contextlib.suppress(FileNotFoundError):  # it was moved between two looks at it
            return self.find(name)
        return None


def load_ahead(items: Sequence[T], load: Callable[[T], U], *, threads: int) -> Generator[U]:
    """Yield `load(item)` for each item, in their order, and load the next ones in threads meanwhile."""
    if threads == 1:
        yield from map(load, items)
        return
    with ThreadPoolExecutor(threads, "segments") as pool:
        started = deque(pool.submit(load, item) for item in items[:threads])
        try:
            for item in items[threads:]:
                yield started.popleft().result()
                started.append(pool.submit(load, item))
            while started:
                yield started.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def list_all(location: LogLocation) -> SegmentListing:
    """List all segments of a log. Open its table only after this call, so that no segment is missed."""
    names = {path.stem for path in list_segments(location.folder)}
    block_bytes: dict[str, int] = {}
    if location.engine is not None:
        block_bytes = segment_sizes(location.engine, location.name)
    # A segment moves in this order, so it is in at least one of the listings.
    uploaded = frozenset(segment.name for segment in list_shared(location))
    names |= block_bytes.keys() | uploaded
    return SegmentListing(
        location=location, names=tuple(sorted(names)), block_bytes=block_bytes, uploaded=uploaded
    )


def list_shared(location: LogLocation) -> list[StoredSegment]:
    """Return the uploaded segments of a log, oldest first."""
    uris = [] if location.shared is None else list_files(location.shared, SUFFIX)
    return [StoredSegment(log=location.name, name=PurePosixPath(uri).stem, uri=uri) for uri in uris]


def shared_uri(location: LogLocation, name: str) -> str | None:
    """Return the URI that a segment is uploaded to; None if the log stays on this machine."""
    return None if location.shared is None else f"{location.shared}/{name}{SUFFIX}"


def segment_records(segment: StoredSegment, store: KeyStore) -> Iterator[dict[str, Any]]:
    """Yield all complete records of a segment.

    Raises:
        RecordLogCorrupt: A record was changed, moved or removed, or the segment's key does not belong to its log. The
            message names file and line.
        AccessDenied, KeyRevoked: The key store refuses the key.
        FileNotFoundError: The segment does not exist.
    """
    with segment.open() as file:
        header = file.readline()
        if not header.endswith(b"\n"):
            return
        cipher = ValueCipher.open(store, *_parse_header(segment, header))
        aad = segment_aad(segment.log, segment.name)
        for number, line in enumerate(file):
            if line.endswith(b"\n"):
                yield _record(segment, number, line, cipher, aad)


def count_segment(segment: StoredSegment) -> int:
    """Return the number of complete records of a segment. No key is needed.

    Raises:
        FileNotFoundError: The segment does not exist.
    """
    with segment.open() as file:
        return max(sum(line.endswith(b"\n") for line in file) - 1, 0)


def segment_class(segment: StoredSegment) -> str | None:
    """Return the column class of a segment's key, or None if the first line is incomplete and there are no records.

    Raises:
        RecordLogCorrupt: The key does not belong to the log.
    """
    with segment.open() as file:
        header = file.readline()
    return _parse_header(segment, header)[0].rpartition("/")[2] if header.endswith(b"\n") else None


def _parse_header(segment: StoredSegment, header: bytes) -> tuple[str, str]:
    """Parse a segment's first line, and return the name of the wrapping key and the wrapped data key."""
    try:
        content = orjson.loads(header)
        key, wrapped = content["key"], content["data_key"]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise RecordLogCorrupt(
            f"{segment.uri}: the first line was changed. Restore it from a backup."
        ) from error
    if not _belongs_to_log(segment.log, key):
        raise RecordLogCorrupt(
            f"{segment.uri}: its key {key!r} does not belong to this log. Restore the file from a backup."
        )
    return key, wrapped


def _belongs_to_log(log: str, key: object) -> bool:
    """Return whether a key belongs to the segment's log: `predictions/<model>/<class>` for `predictions/<model>`.

    The segment's first line names the key. Without this check, a principal with another key could add forged records.
    """
    of_log, _, column_class = str(key).rpartition("/")
    return isinstance(key, str) and of_log == log and column_class in COLUMN_CLASSES


def _record(
    segment: StoredSegment, number: int, line: bytes, cipher: ValueCipher, aad: str
) -> dict[str, Any]:
    try:
        data = cipher.decrypt(base64.b64decode(line[:-1], validate=True), value_aad(aad, b"%d" % number))
    except (ArtifactTampered, ValueError) as error:
        raise RecordLogCorrupt(
            f"{segment.uri}, line {number + 2}: the record was changed, or an earlier one was removed. "
            "Restore the file from a backup."
        ) from error
    return dict(orjson.loads(data))
