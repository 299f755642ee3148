"""A view's source files: which there are, whether they can be read, and a digest of their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from cluster.errors import SourceError
from cluster.storage import Layout, is_uri, resolve, sha256

STORAGE = "{storage}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFiles:
    """The files of one batch."""

    paths: list[str]
    rows: int
    digest: str


def open_source(path: str, places: Layout) -> SourceFiles:
    """Find and check the Parquet files of a path, folder or glob.

    Raises:
        SourceError: there is no file, one cannot be read, or there is no row.
    """
    full = resolve(path.replace(STORAGE, places.root))
    paths = find(full)
    rows = sum(_num_rows(file) for file in paths)
    if rows == 0:
        raise SourceError(f"Source {full} is empty: {len(paths)} files, no row. Nothing was ingested.")
    digest = hashlib.sha256("".join(sha256(file) for file in paths).encode()).hexdigest()
    return SourceFiles(paths=paths, rows=rows, digest=digest)


def find(full: str) -> list[str]:
    """The Parquet files at a path, in a folder, or of a glob, sorted.

    Raises:
        SourceError: there is none.
    """
    fs, path = url_to_fs(full)
    if fs.isdir(path):
        found = fs.glob(f"{path}/**/*.parquet")
    elif any(sign in path for sign in "*?["):
        found = fs.glob(path)
    else:
        found = [path] if fs.exists(path) else []
    if not found:
        raise SourceError(f"No Parquet file at {full}. Give another with `source.path=…`.")
    return [fs.unstrip_protocol(name) if is_uri(full) else str(name) for name in sorted(found)]


def head(path: str, rows: int) -> pa.Table:
    """The first rows of a file.

    Raises:
        SourceError: its footer can be read, its rows cannot.
    """
    fs, name = url_to_fs(path)
    try:
        with fs.open(name, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=rows):
                return pa.Table.from_batches([batch])
            return pq.ParquetFile(file).schema_arrow.empty_table()
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"Source {path} cannot be read as Parquet: {error}") from error


def _num_rows(path: str) -> int:
    fs, name = url_to_fs(path)
    try:
        with fs.open(name, "rb") as file:
            return int(pq.ParquetFile(file).metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"Source {path} cannot be read as Parquet: {error}") from error
