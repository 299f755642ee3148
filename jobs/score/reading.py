"""Read the rows of a part, and only the columns that are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import SourceError
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess
from cluster.storage import file_system, is_uri
from feature_jobs.store.ingestion.files import tables
from jobs.score.config import InputFormat
from jobs.score.source import Part, Source

_BATCH_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of a part that become one output file."""

    number: int
    first_row: int
    table: pa.Table = field(repr=False)


def read_part(
    source: Source, part: Part, columns: Sequence[str], *, part_rows: int, access: KeyAccess
) -> Iterator[Chunk]:
    """Yield a part's rows in chunks of at most `part_rows` rows. A part of Parquet is one chunk.

    Raises:
        SourceError: The file cannot be read.
    """
    if source.format is InputFormat.csv:
        yield from _csv_chunks(source, part, columns, part_rows)
        return
    if source.protection is not None:
        table = _protected_rows(source, part, columns, access)
    else:
        table = _parquet_rows(part, columns)
    for name, value in part.file.partition:
        if name in columns and name not in table.column_names:
            kind = source.schema.field(name).type
            table = table.append_column(name, pa.repeat(pa.scalar(value, kind), table.num_rows))
    if missing := [name for name in columns if name not in table.column_names]:
        raise SourceError(f"File {part.file.path} has no column '{missing[0]}'.")
    if table.num_rows != part.rows:
        raise SourceError(f"File {part.file.path} was changed while it was read. Run the command again.")
    yield Chunk(0, part.first_row, plain_text(table.select(list(columns))))


def _parquet_rows(part: Part, columns: Sequence[str]) -> pa.Table:
    path, batches, position = part.file.path, [], 0
    end = part.skip + part.rows
    try:
        with _open(path) as source:
            file = pq.ParquetFile(source, coerce_int96_timestamp_unit="us")
            names = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(
                _BATCH_ROWS, row_groups=list(part.row_groups or ()), columns=names
            ):
                low, high = max(part.skip - position, 0), min(end - position, batch.num_rows)
                if low < high:
                    batches.append(batch.slice(low, high - low))
                position += batch.num_rows
                if position >= end:
                    break
            schema = pa.schema([file.schema_arrow.field(name) for name in names])
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {str(error)[:200]}") from error
    return pa.Table.from_batches(batches, batches[0].schema if batches else schema).replace_schema_metadata(
        None
    )


def _open(path: str) -> Any:
    if not is_uri(path):
        return pa.OSFile(path)
    fs, name = file_system(path)
    return fs.open(name, "rb")


def _protected_rows(source: Source, part: Part, columns: Sequence[str], access: KeyAccess) -> pa.Table:
    files = protected_files(access)
    with files.open(part.file.path, protection=source.protection, place=source.place, unplaced=True) as file:
        groups = [file.read(columns, row_group=number) for number in part.row_groups or ()]
    return pa.concat_tables(groups).slice(part.skip, part.rows)


def _csv_chunks(source: Source, part: Part, columns: Sequence[str], part_rows: int) -> Iterator[Chunk]:
    pending: list[pa.Table] = []
    pending_rows = number = 0
    for block in tables(part.file.path, 1, source.text_source):
        pending.append(block.select(list(columns)))
        pending_rows += block.num_rows
        while pending_rows >= part_rows:
            table = pa.concat_tables(pending)
            yield Chunk(number, part.first_row + number * part_rows, table.slice(0, part_rows))
            number += 1
            pending_rows -= part_rows
            pending = [table.slice(part_rows)]
    if pending_rows:
        yield Chunk(number, part.first_row + number * part_rows, pa.concat_tables(pending))


def plain_text(table: pa.Table) -> pa.Table:
    """Return the table with `string_view` columns as `string`, because several Arrow functions need that."""
    fields = [
        one.with_type(pa.string()) if pa.types.is_string_view(one.type) else one for one in table.schema
    ]
    return table.cast(pa.schema(fields))
