"""`python -m cluster.security.scan --canary TEXT PATH…`: look for words that must not lie on disk in the clear.

Plant unmistakable values in protected columns, run the platform, then scan its folders. A file is searched as it lies
there (UTF-8 and UTF-16) and as far as anybody without a key can unpack it: Parquet columns, gzip, and members of zip.
Exits 0 when nothing is found, 2 when something is; a file that changes or vanishes meanwhile is looked at as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import mmap
import os
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.entrypoint import REFUSED

MAX_UNPACKED_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A canary in the clear."""

    canary: str
    path: str
    place: str
    """`bytes`, a column, or a member."""


def scan(paths: Iterable[Path], canaries: Iterable[str]) -> Iterator[Found]:
    """Every canary in every regular file at or below the paths."""
    words = list(canaries)
    for path in paths:
        for file in _files(path):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                yield from _scan_file(file, words)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG(file.lstat().st_mode):
                    yield file


def _scan_file(file: Path, words: list[str]) -> Iterator[Found]:
    if file.stat().st_size == 0:
        return
    with file.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from _in_bytes(data, words, path=str(file), place="bytes")
        head = data[:4]
    match head:
        case b"PAR1":
            yield from _in_parquet(file, words)
        case b"PK\x03\x04":
            with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    with archive.open(member) as unpacked:
                        content = unpacked.read(MAX_UNPACKED_BYTES)
                    yield from _in_bytes(content, words, path=str(file), place=member.filename)
        case _ if head[:2] == b"\x1f\x8b":
            with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(file) as unpacked:
                content = unpacked.read(MAX_UNPACKED_BYTES)
                yield from _in_bytes(content, words, path=str(file), place="gzip")


def _in_bytes(data: bytes | mmap.mmap, words: list[str], *, path: str, place: str) -> Iterator[Found]:
    for word in words:
        if any(data.find(word.encode(encoding)) >= 0 for encoding in ("utf-8", "utf-16-le")):
            yield Found(canary=word, path=path, place=place)


def _in_parquet(file: Path, words: list[str]) -> Iterator[Found]:
    try:
        names = pq.ParquetFile(file).schema_arrow.names
    except (pa.ArrowException, OSError):
        return
    for name in names:
        try:
            values = pq.ParquetFile(file).read([name])[name]
        except (pa.ArrowException, OSError):
            continue  # encrypted: its bytes were looked at above
        with contextlib.suppress(pa.ArrowException):
            texts = pc.cast(values, pa.string())
            for word in words:
                if pc.any(pc.match_substring(texts, word)).as_py():
                    yield Found(canary=word, path=str(file), place=f"column {name}")


def main() -> None:
    """Scan and say what was found."""
    parser = argparse.ArgumentParser(prog="python -m cluster.security.scan", description=__doc__)
    parser.add_argument("--canary", action="append", required=True, help="text to look for; may be repeated")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="file or folder")
    arguments = parser.parse_args()
    for path in arguments.paths:
        if not path.exists():
            print(f"refused: There is no {path} to scan.", file=sys.stderr)
            sys.exit(REFUSED)
    found = list(scan(arguments.paths, arguments.canary))
    for one in found:
        print(f"{one.path}: {one.canary!r} in the clear ({one.place})")
    print(f"{len(found)} found")
    sys.exit(REFUSED if found else 0)


if __name__ == "__main__":
    main()
