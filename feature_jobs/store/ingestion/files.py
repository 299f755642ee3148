"""A view's source files: which there are, whether they can be read, and a digest of their content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
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
from cluster.storage import Layout, int96_columns, is_uri, resolve, sha256
from feature_jobs.store.definitions.sources import FileFormat, FileSource
from feature_jobs.store.ingestion.int96 import exact_times
from feature_jobs.store.ingestion.partitions import partitions_of, with_digest

STORAGE = "{storage}"
_CSV_BLOCK = 16 << 20
_NAMES = {FileFormat.parquet: "Parquet", FileFormat.csv: "CSV", FileFormat.json: "JSON lines"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFiles:
    """The files of one batch."""

    paths: list[str]
    sizes: list[int]
    """Rows of each."""
    digest: str
    source: FileSource
    """How to read them."""

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(self.sizes)

    @property
    def names(self) -> str:
        """As events name them."""
        return ", ".join(path.rsplit("/", 1)[-1] for path in self.paths)


def open_source(source: FileSource, places: Layout, *, declared: Collection[str] = ()) -> SourceFiles:
    """Find and check the files of a path, folder or glob; text is read to its end.

    Args:
        source: which.
        places: where the storage root is.
        declared: columns that may come from partition folders.

    Raises:
        SourceError: there is no file, or one cannot be read.
    """
    full = resolve(source.path.replace(STORAGE, places.root))
    paths = find(full, source.kind)
    sizes = [_num_rows(file, source) for file in paths]
    parts = [_digest(file, source, declared) for file in paths]
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    return SourceFiles(paths=paths, sizes=sizes, digest=digest, source=source)


def _digest(path: str, source: FileSource, declared: Collection[str]) -> str:
    content = sha256(path)
    if not partitions_of(path, declared):
        return content
    first = head(path, 1, source)
    lines = parsed_lines(first["text"].to_pylist()) if source.kind is FileFormat.json else []
    return with_digest(content, path, declared, lines[0].keys() if lines else first.column_names)


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
    """The first rows of a file, as `tables` gives them; of one without rows its columns.

    Raises:
        SourceError: its rows cannot be read.
    """
    return next(tables(path, rows, source)).slice(0, rows)


def tables(path: str, rows: int, source: FileSource) -> Iterator[pa.Table]:
    """A file in parts of some rows, at least one part; of text files all columns as text, of JSON lines the lines in a
    column `text`.

    Raises:
        SourceError: its rows cannot be read.
        SchemaMismatch: a time would change.
    """
    options = csv_options([path], source) if source.kind is FileFormat.csv else {}
    with _reading(path, source) as file:
        match source.kind:
            case FileFormat.csv:
                reader = pcsv.open_csv(file, read_options=pcsv.ReadOptions(block_size=_CSV_BLOCK), **options)
                empty = True
                for batch in reader:
                    empty = False
                    yield pa.Table.from_batches([batch])
                if empty:
                    yield reader.schema.empty_table()
            case FileFormat.json:
                lines = _lines(file)
                part = list(islice(lines, rows))
                yield pa.table({"text": pa.array(part, pa.string())})
                while part := list(islice(lines, rows)):
                    yield pa.table({"text": pa.array(part, pa.string())})
            case FileFormat.parquet:
                yield from _parquet(path, file, rows, source)


def _parquet(path: str, file: IO[bytes], rows: int, source: FileSource) -> Iterator[pa.Table]:
    coarse = pq.ParquetFile(file, coerce_int96_timestamp_unit="us")
    parts = (pa.Table.from_batches([batch]) for batch in coarse.iter_batches(batch_size=rows))
    if not coarse.metadata.num_rows:
        yield coarse.schema_arrow.empty_table()
    elif not (wide := int96_columns(coarse)):
        yield from parts
    else:
        rounded_up = {source.event_timestamp, source.created_timestamp or source.event_timestamp}
        with _reading(path, source) as again:
            fine = pq.ParquetFile(again).iter_batches(batch_size=rows, columns=wide)
            for part, times in zip(parts, fine, strict=True):
                yield exact_times(part, pa.Table.from_batches([times]), rounded_up)


def parquet_schema(path: str, source: FileSource) -> pa.Schema:
    """A Parquet file's columns, as `tables` gives them.

    Raises:
        SourceError: it cannot be read.
    """
    with _reading(path, source) as file:
        return pq.ParquetFile(file, coerce_int96_timestamp_unit="us").schema_arrow.remove_metadata()


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


def header(path: str, source: FileSource) -> list[str]:
    """The columns of a CSV file.

    Raises:
        SourceError: it has no header, or cannot be read.
    """
    return _header(path, source, pcsv.ParseOptions(delimiter=source.delimiter, newlines_in_values=True))


def _header(path: str, source: FileSource, parse: pcsv.ParseOptions) -> list[str]:
    with _reading(path, source) as file:
        first = file.readline().decode("utf-8-sig")
    if not first.strip():
        raise SourceError(f"Source {path} has no header: it begins with an empty line.")
    line = pa.BufferReader(first.rstrip("\r\n").encode() + b"\n")
    return list(pcsv.read_csv(line, parse_options=parse).column_names)


def parsed_lines(lines: list[str], *, first: int = 1) -> list[dict[str, Any]]:
    """The objects of JSON lines.

    Args:
        lines: without blank ones.
        first: number of the first line, blank ones not counted.

    Raises:
        SourceError: a line is no JSON object.
    """
    rows = []
    for number, line in enumerate(lines, start=first):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise SourceError(f"Line {number} is no JSON: {error.msg}.") from error
        if not isinstance(row, dict):
            raise SourceError(
                f"Line {number} is {type(row).__name__}, no JSON object. Write one object a line."
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
