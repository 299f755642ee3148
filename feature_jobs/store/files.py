"""A view's source files: which there are, whether they can be read, and a digest of their content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from cluster.errors import SourceError
from cluster.storage import Layout, is_uri, resolve, sha256
from feature_jobs.store.sources import FileFormat, FileSource

STORAGE = "{storage}"
_NAMES = {FileFormat.parquet: "Parquet", FileFormat.csv: "CSV", FileFormat.json: "JSON lines"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFiles:
    """The files of one batch."""

    paths: list[str]
    rows: int
    digest: str
    source: FileSource
    """How to read them."""

    @property
    def names(self) -> str:
        """As events name them."""
        return ", ".join(path.rsplit("/", 1)[-1] for path in self.paths)


def open_source(source: FileSource, places: Layout) -> SourceFiles:
    """Find and check the files of a path, folder or glob; text is read to its end.

    Raises:
        SourceError: there is no file, one cannot be read, or there is no row.
    """
    full = resolve(source.path.replace(STORAGE, places.root))
    paths = find(full, source.kind)
    rows = sum(_num_rows(file, source) for file in paths)
    if rows == 0:
        raise SourceError(f"Source {full} is empty: {len(paths)} files, no row. Nothing was ingested.")
    digest = hashlib.sha256("".join(sha256(file) for file in paths).encode()).hexdigest()
    return SourceFiles(paths=paths, rows=rows, digest=digest, source=source)


def find(full: str, kind: FileFormat) -> list[str]:
    """The files of a format at a path, in a folder, or of a glob, sorted.

    Raises:
        SourceError: there is none.
    """
    fs, path = url_to_fs(full)
    if fs.isdir(path):
        found = [name for suffix in kind.suffixes for name in fs.glob(f"{path}/**/*{suffix}")]
    elif any(sign in path for sign in "*?["):
        found = fs.glob(path)
    else:
        found = [path] if fs.exists(path) else []
    if not found:
        raise SourceError(f"No {_NAMES[kind]} file at {full}. Give another with `source.path=…`.")
    return [fs.unstrip_protocol(name) if is_uri(full) else str(name) for name in sorted(set(found))]


def head(path: str, rows: int, source: FileSource) -> pa.Table:
    """The first rows of a file: of text files all columns as text, of JSON lines the lines in a column `text`.

    Raises:
        SourceError: its rows cannot be read.
    """
    options = csv_options([path], source) if source.kind is FileFormat.csv else {}
    with _reading(path, source) as file:
        match source.kind:
            case FileFormat.csv:
                for batch in pcsv.open_csv(file, **options):
                    return pa.Table.from_batches([batch]).slice(0, rows)
            case FileFormat.json:
                return pa.table({"text": pa.array(islice(_lines(file), rows), pa.string())})
            case FileFormat.parquet:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=rows):
                    return pa.Table.from_batches([batch])
                return pq.ParquetFile(file).schema_arrow.empty_table()
    raise SourceError(f"Source {path} has no rows.")


def whole(path: str, source: FileSource) -> pa.Table:
    """All rows of a file, in the form of `head`.

    Raises:
        SourceError: its rows cannot be read.
    """
    options = csv_options([path], source) if source.kind is FileFormat.csv else {}
    with _reading(path, source) as file:
        match source.kind:
            case FileFormat.csv:
                return pcsv.open_csv(file, **options).read_all()
            case FileFormat.json:
                return pa.table({"text": pa.array(_lines(file), pa.string())})
            case FileFormat.parquet:
                return pq.ParquetFile(file).read()


def size_bytes(paths: list[str]) -> int:
    """What files take where they lie."""
    return sum(int(fs.size(name)) for fs, name in map(url_to_fs, paths))


def csv_options(paths: list[str], source: FileSource) -> dict[str, Any]:
    """How Arrow reads CSV files: every column as text, so that nothing is guessed.

    Raises:
        SourceError: a file has no header.
    """
    parse = pcsv.ParseOptions(delimiter=source.delimiter, newlines_in_values=True)
    convert = pcsv.ConvertOptions(
        column_types={name: pa.string() for path in paths for name in _header(path, source, parse)},
        null_values=list(source.nulls),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    return {"parse_options": parse, "convert_options": convert}


def _header(path: str, source: FileSource, parse: pcsv.ParseOptions) -> list[str]:
    with _reading(path, source) as file:
        first = file.readline().decode("utf-8-sig")
    if not first.strip():
        raise SourceError(f"Source {path} has no header: it begins with an empty line.")
    line = pa.BufferReader(first.rstrip("\r\n").encode() + b"\n")
    return list(pcsv.read_csv(line, parse_options=parse).column_names)


def parsed_lines(lines: list[str]) -> list[dict[str, Any]]:
    """The objects of JSON lines.

    Raises:
        SourceError: a line is no JSON object.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise SourceError(f"Line {number} of one block is no JSON: {error.msg}.") from error
        if not isinstance(row, dict):
            raise SourceError(
                f"Line {number} of one block is {type(row).__name__}, no JSON object. Write one object a line."
            )
        rows.append(row)
    return rows


def _num_rows(path: str, source: FileSource) -> int:
    options = csv_options([path], source) if source.kind is FileFormat.csv else {}
    with _reading(path, source) as file:
        match source.kind:
            case FileFormat.csv:
                return sum(batch.num_rows for batch in pcsv.open_csv(file, **options))
            case FileFormat.json:
                return sum(1 for _ in _lines(file))
            case FileFormat.parquet:
                return int(pq.ParquetFile(file).metadata.num_rows)


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Lines that are not blank."""
    for line in file:
        text = line.decode().strip()
        if text:
            yield text


@contextmanager
def _reading(path: str, source: FileSource) -> Iterator[IO[bytes]]:
    """An open file, uncompressed where its name says that it is; errors are refusals without the rows' content."""
    fs, name = url_to_fs(path)
    try:
        with fs.open(name, "rb", compression="infer") as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnicodeDecodeError):
            said = "it is no UTF-8"
        elif source.kind is FileFormat.csv:
            said = re.sub(r"(got \d+): .*", r"\1", said)  # the rest quotes the row
        raise SourceError(f"Source {path} cannot be read as {_NAMES[source.kind]}: {said}") from error
