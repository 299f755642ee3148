"""`python -m cluster.security.scan --canary TEXT PATH…`: search files for protected values that are not encrypted.

Put unmistakable values (canaries) into protected columns, run the platform, then scan its folders. Each file is
searched as raw bytes: for UTF-8, UTF-16, and numbers also as int64 and float64. Files that can be unpacked without a
key are also searched inside: Parquet and Arrow columns, SQLite tables, members of zip archives, and data compressed
with gzip, bzip2, xz, zstd or lz4. Names of files and folders are searched, too. The scan does not find base64, archives
within archives, and numbers whose bytes are common, such as 42.

The exit code is 0 if no canary was found, 2 if a canary was found, and 1 if none was found but a file could not be
read. A file that changes during the scan is searched in the state in which it is read.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import mmap
import os
import sqlite3
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from lzma import LZMAError, LZMAFile
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.entrypoint import REFUSED

PIECE_BYTES = 8 * 2**20
BATCH_ROWS = 64 * 1024
MIN_NUMBER_BYTES = 5
_STREAMS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_BROKEN = (pa.ArrowException, OSError, EOFError, zlib.error, LZMAError, zipfile.BadZipFile)


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryMatch:
    """A canary that was found unencrypted."""

    canary: str
    path: str
    location: str
    """`bytes`, `name`, a column, a table or a member of an archive."""


_Forms = dict[str, list[bytes]]
"""Maps canary to the byte strings that can encode it."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def scan(
    paths: Iterable[Path], canaries: Iterable[str], *, unread: list[Path] | None = None
) -> Iterator[CanaryMatch]:
    """Yield every canary found in the regular files at or below the paths.

    Args:
        paths: files and folders; links are not followed.
        canaries: texts to search for.
        unread: list that collects the files that this process may not read.
    """
    forms_by_canary = {canary: _forms(canary) for canary in canaries}
    for root in paths:
        for file in _files(root):
            relative_path = os.path.relpath(file, root.parent)
            yield from (
                CanaryMatch(canary=canary, path=str(file), location="name")
                for canary in forms_by_canary
                if canary in relative_path
            )
            try:
                if stat.S_ISREG(file.lstat().st_mode):
                    yield from _scan_file(file, forms_by_canary)
            except FileNotFoundError:
                continue
            except PermissionError:
                if unread is not None:
                    unread.append(file)


def _forms(canary: str) -> list[bytes]:
    """Return the byte strings that can encode a canary."""
    forms = [canary.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be")]
    with contextlib.suppress(ValueError, OverflowError, struct.error):
        numbers = [struct.pack("<d", float(canary))] if math.isfinite(float(canary)) else []
        if (integer := _as_integer(canary)) is not None:
            numbers.append(struct.pack("<q", integer))
        forms += [form for form in numbers if len(form.strip(b"\x00\xff")) >= MIN_NUMBER_BYTES]
    return forms


def _as_integer(canary: str) -> int | None:
    try:
        return int(canary)
    except ValueError:
        return None


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)


def _scan_file(file: Path, forms_by_canary: _Forms) -> Iterator[CanaryMatch]:
    if file.stat().st_size == 0:
        return
    with file.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = data[:16]
        yield from _hits(_find_in_bytes(data, forms_by_canary), file, "bytes")
    with contextlib.suppress(*_BROKEN):
        yield from _scan_unpacked(file, head, forms_by_canary)


def _scan_unpacked(file: Path, head: bytes, forms_by_canary: _Forms) -> Iterator[CanaryMatch]:
    if head.startswith(b"PAR1"):
        yield from _scan_parquet(file, forms_by_canary)
    elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        open_source = pa.ipc.open_file if head.startswith(b"ARROW1") else pa.ipc.open_stream
        with pa.memory_map(str(file)) as source:
            yield from _hits(_find_in_table(open_source(source).read_all(), forms_by_canary), file, "Arrow")
    elif head.startswith(b"SQLite format 3\x00"):
        yield from _scan_sqlite(file, forms_by_canary)
    elif head.startswith(b"PK\x03\x04"):
        yield from _scan_zip(file, forms_by_canary)
    elif head.startswith(b"\xfd7zXZ\x00"):
        with LZMAFile(file) as unpacked:
            yield from _hits(_find_in_stream(unpacked, forms_by_canary), file, "xz")
    for magic, codec in _STREAMS.items():
        if head.startswith(magic):
            with pa.CompressedInputStream(pa.OSFile(str(file)), codec) as stream:
                yield from _hits(_find_in_stream(stream, forms_by_canary), file, codec)


def _hits(canaries: Iterable[str], file: Path, location: str) -> Iterator[CanaryMatch]:
    return (
        CanaryMatch(canary=canary, path=str(file), location=location) for canary in dict.fromkeys(canaries)
    )


def _find_in_bytes(data: bytes | mmap.mmap, forms_by_canary: _Forms) -> Iterator[str]:
    return (
        canary for canary, forms in forms_by_canary.items() if any(data.find(form) >= 0 for form in forms)
    )


def _find_in_stream(stream: _Readable, forms_by_canary: _Forms) -> Iterator[str]:
    """Search a file in pieces. Each piece starts with the end of the previous piece, because a canary may span both."""
    overlap = max((len(form) for forms in forms_by_canary.values() for form in forms), default=1) - 1
    previous_end = b""
    while piece := stream.read(PIECE_BYTES):
        data = previous_end + piece
        yield from _find_in_bytes(data, forms_by_canary)
        previous_end = data[-overlap:] if overlap else b""


def _scan_zip(file: Path, forms_by_canary: _Forms) -> Iterator[CanaryMatch]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            # A member may be encrypted, or compressed with a method that Python does not support.
            with (
                contextlib.suppress(RuntimeError, NotImplementedError, *_BROKEN),
                archive.open(member) as unpacked,
            ):
                yield from _hits(_find_in_stream(unpacked, forms_by_canary), file, member.filename)


def _scan_parquet(file: Path, forms_by_canary: _Forms) -> Iterator[CanaryMatch]:
    for name in pq.ParquetFile(file).schema_arrow.names:
        with contextlib.suppress(*_BROKEN):  # an encrypted column; its raw bytes were already searched
            batches = pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=[name])
            canaries = (
                canary for batch in batches for canary in _find_in_table(pa.table(batch), forms_by_canary)
            )
            yield from _hits(canaries, file, f"column {name}")


def _find_in_table(table: pa.Table, forms_by_canary: _Forms) -> Iterator[str]:
    """Search the buffers of a table, then compare its integer columns by value.

    Integers of less than 64 bits have other bytes than the byte strings that are searched for.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.BufferReader(sink.getvalue()) as stream:
        yield from _find_in_stream(stream, forms_by_canary)
    numbers = [column for column in table.columns if pa.types.is_integer(column.type)]
    for canary in forms_by_canary:
        integer = _as_integer(canary)
        if integer is not None and any(_contains(column, integer) for column in numbers):
            yield canary


def _contains(column: pa.ChunkedArray, number: int) -> bool:
    try:
        return bool(pc.any(pc.equal(column, pa.scalar(number, column.type))).as_py())
    except (pa.ArrowInvalid, OverflowError):
        return False  # the number is out of the column's range


def _scan_sqlite(file: Path, forms_by_canary: _Forms) -> Iterator[CanaryMatch]:
    """Search a database value by value, because a long value is split over several pages."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as db,
    ):
        db.text_factory = bytes
        tables = [
            str(row[0], "utf-8") for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")
        ]
        for table in tables:
            with contextlib.suppress(sqlite3.Error):
                rows = db.execute('SELECT * FROM "{}"'.format(table.replace('"', '""')))  # noqa: S608
                values = (_as_bytes(value) for row in rows for value in row)
                canaries = (canary for value in values for canary in _find_in_bytes(value, forms_by_canary))
                yield from _hits(canaries, file, f"table {table}")


def _as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def main() -> None:
    """Scan the paths and print the findings."""
    parser = argparse.ArgumentParser(prog="python -m cluster.security.scan", description=__doc__)
    parser.add_argument(
        "--canary", action="append", required=True, help="text to search for; may be repeated"
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="file or folder")
    arguments = parser.parse_args()
    if "" in arguments.canary:
        parser.error("a canary must not be empty")
    for path in arguments.paths:
        if not path.exists():
            print(f"refused: There is no {path} to scan.", file=sys.stderr)
            sys.exit(REFUSED)
    unread: list[Path] = []
    hits = list(scan(arguments.paths, arguments.canary, unread=unread))
    for hit in hits:
        print(f"{hit.path}: {hit.canary!r} in the clear ({hit.location})")
    for file in unread:
        print(f"{file}: not searched, because it may not be read", file=sys.stderr)
    print(f"{len(hits)} found")
    sys.exit(REFUSED if hits else int(bool(unread)))


if __name__ == "__main__":
    main()
