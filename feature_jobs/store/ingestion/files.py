"""A view's source files: find them, read them, and compute a digest of their content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from cluster.errors import SourceError
from cluster.storage import Layout, file_system, int96_columns, is_uri, resolve, sha256
from feature_jobs.store.definitions.sources import FileFormat, FileSource
from feature_jobs.store.ingestion.int96 import exact_times
from feature_jobs.store.ingestion.partitions import partitions_of, with_digest

STORAGE = "{storage}"
_CSV_BLOCK_BYTES = 16 << 20
_FORMAT_NAMES = {FileFormat.parquet: "Parquet", FileFormat.csv: "CSV", FileFormat.json: "JSON lines"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFiles:
    """The files of one batch."""

    paths: list[str]
    sizes: list[int]
    """Number of rows of each file."""
    digest: str
    source: FileSource
    """How to read the files."""

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(self.sizes)

    @property
    def names(self) -> str:
        """The files' names, as events state them."""
        return ", ".join(path.rsplit("/", 1)[-1] for path in self.paths)


def open_source(source: FileSource, places: Layout, *, declared: Collection[str] = ()) -> SourceFiles:
    """Find the files of a path, folder or glob, and count their rows. For this, text files are read completely.

    Args:
        source: path and format of the files.
        places: layout of the storage root.
        declared: columns that may come from partition folders.

    Raises:
        SourceError: no file was found, or a file cannot be read.
    """
    uri = resolve(source.path.replace(STORAGE, places.root))
    paths = find(uri, source.kind)
    sizes = [_num_rows(path, source) for path in paths]
    digests = [_digest(path, source, declared) for path in paths]
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    return SourceFiles(paths=paths, sizes=sizes, digest=digest, source=source)


def _digest(path: str, source: FileSource, declared: Collection[str]) -> str:
    content = sha256(path)
    if not partitions_of(path, declared):
        return content
    first = head(path, 1, source)
    lines = parse_json_lines(first["text"].to_pylist()) if source.kind is FileFormat.json else []
    return with_digest(content, path, declared, lines[0].keys() if lines else first.column_names)


def find(uri: str, kind: FileFormat) -> list[str]:
    """Return the files of a format at a path, in a folder or matching a glob, sorted.

    Raises:
        SourceError: no file was found.
    """
    fs, path = file_system(uri)
    if fs.isdir(path):
        names = [name for suffix in kind.suffixes for name in fs.glob(f"{path}/**/*{suffix}")]
    elif any(sign in path for sign in "*?["):
        names = fs.glob(path)
    else:
        names = [path] if fs.exists(path) else []
    if not names:
        raise SourceError(f"No {_FORMAT_NAMES[kind]} file at {uri}. Give another with `source.path=…`.")
    return [fs.unstrip_protocol(name) if is_uri(uri) else str(name) for name in sorted(set(names))]


def head(path: str, rows: int, source: FileSource) -> pa.Table:
    """Return the first rows of a file, in the form of `tables`. A file without rows gives an empty table.

    Raises:
        SourceError: the rows cannot be read.
    """
    return next(tables(path, rows, source)).slice(0, rows)


def tables(
    path: str, rows: int, source: FileSource, *, row_groups: Sequence[int] | None = None
) -> Iterator[pa.Table]:
    """Yield a file in one or more parts: 16 MiB each for CSV, at most `rows` rows each for other formats.

    All columns of a CSV file are text. The lines of a JSON lines file are in one column, `text`. With `row_groups`,
    only these row groups of a Parquet file are read.

    Raises:
        SourceError: the rows cannot be read.
        SchemaMismatch: a time would change.
    """
    options = csv_options([path], source) if source.kind is FileFormat.csv else {}
    with _open(path, source) as file:
        match source.kind:
            case FileFormat.csv:
                read_options = pcsv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
                reader = pcsv.open_csv(file, read_options=read_options, **options)
                empty = True
                for batch in reader:
                    empty = False
                    yield pa.Table.from_batches([batch])
                if empty:
                    yield reader.schema.empty_table()
            case FileFormat.json:
                lines = _nonblank_lines(file)
                part = list(islice(lines, rows))
                yield pa.table({"text": pa.array(part, pa.string())})
                while part := list(islice(lines, rows)):
                    yield pa.table({"text": pa.array(part, pa.string())})
            case FileFormat.parquet:
                yield from _parquet_tables(path, file, rows, source, row_groups)


def _parquet_tables(
    path: str, file: IO[bytes], rows: int, source: FileSource, row_groups: Sequence[int] | None
) -> Iterator[pa.Table]:
    coarse = pq.ParquetFile(file, coerce_int96_timestamp_unit="us")
    batches = coarse.iter_batches(batch_size=rows, row_groups=row_groups)
    parts = (pa.Table.from_batches([batch]) for batch in batches)
    if not coarse.metadata.num_rows:
        yield coarse.schema_arrow.empty_table()
    elif not (int96_names := int96_columns(coarse)):
        yield from parts
    else:
        rounded_up = {source.event_timestamp, source.created_timestamp or source.event_timestamp}
        with _open(path, source) as second_file:
            fine = pq.ParquetFile(second_file).iter_batches(
                batch_size=rows, columns=int96_names, row_groups=row_groups
            )
            for part, times in zip(parts, fine, strict=True):
                yield exact_times(part, pa.Table.from_batches([times]), rounded_up)


def parquet_schema(path: str, source: FileSource) -> pa.Schema:
    """Return a Parquet file's columns, with the types that `tables` gives them.

    Raises:
        SourceError: the file cannot be read.
    """
    with _open(path, source) as file:
        return pq.ParquetFile(file, coerce_int96_timestamp_unit="us").schema_arrow.remove_metadata()


def row_group_sizes(path: str, source: FileSource) -> list[int]:
    """Return the number of rows of each row group of a Parquet file.

    Raises:
        SourceError: the file cannot be read.
    """
    with _open(path, source) as file:
        metadata = pq.ParquetFile(file).metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def size_bytes(paths: list[str]) -> int:
    """Return the stored size of some files in bytes."""
    return sum(int(fs.size(name)) for fs, name in map(file_system, paths))


def csv_options(paths: list[str], source: FileSource) -> dict[str, Any]:
    """Return Arrow's options for CSV files: every column is read as text, so that Arrow guesses no type.

    Raises:
        SourceError: a file has no header.
    """
    convert = pcsv.ConvertOptions(
        column_types={name: pa.string() for path in paths for name in header(path, source)},
        null_values=list(source.nulls),
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    return {"parse_options": _csv_parse_options(source), "convert_options": convert}


def header(path: str, source: FileSource) -> list[str]:
    """Return the columns of a CSV file.

    Raises:
        SourceError: the file has no header, or cannot be read.
    """
    with _open(path, source) as file:
        first = file.readline().decode("utf-8-sig")
    if not first.strip():
        raise SourceError(f"Source {path} has no header: it begins with an empty line.")
    line = pa.BufferReader(first.rstrip("\r\n").encode() + b"\n")
    return list(pcsv.read_csv(line, parse_options=_csv_parse_options(source)).column_names)


def _csv_parse_options(source: FileSource) -> pcsv.ParseOptions:
    return pcsv.ParseOptions(delimiter=source.delimiter, newlines_in_values=True)


def parse_json_lines(lines: list[str], *, first_number: int = 1) -> list[dict[str, Any]]:
    """Return the objects of JSON lines.

    Args:
        lines: lines that are not blank.
        first_number: number of the first line; blank lines are not counted.

    Raises:
        SourceError: a line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(lines, start=first_number):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise SourceError(f"Line {number} is not JSON: {error.msg}.") from error
        if not isinstance(row, dict):
            raise SourceError(
                f"Line {number} is {type(row).__name__}, not a JSON object. Write one object per line."
            )
        rows.append(row)
    return rows


def _num_rows(path: str, source: FileSource) -> int:
    options = csv_options([path], source) if source.kind is FileFormat.csv else {}
    with _open(path, source) as file:
        match source.kind:
            case FileFormat.csv:
                return sum(batch.num_rows for batch in pcsv.open_csv(file, **options))
            case FileFormat.json:
                return sum(1 for _ in _nonblank_lines(file))
            case FileFormat.parquet:
                return int(pq.ParquetFile(file).metadata.num_rows)


def _nonblank_lines(file: IO[bytes]) -> Iterator[str]:
    for line in file:
        text = line.decode().strip()
        if text:
            yield text


@contextmanager
def _open(path: str, source: FileSource) -> Iterator[IO[bytes]]:
    """Open a file, and decompress it according to its name. An error becomes a SourceError that quotes no row."""
    fs, name = file_system(path)
    try:
        with fs.open(name, "rb", compression="infer") as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnicodeDecodeError):
            cause = "it is not UTF-8"
        elif source.kind is FileFormat.csv:
            cause = re.sub(r"(got \d+): .*", r"\1", cause)  # the rest quotes the row
        raise SourceError(f"Source {path} cannot be read as {_FORMAT_NAMES[source.kind]}: {cause}") from error
