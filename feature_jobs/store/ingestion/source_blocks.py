"""Read a source's files in blocks. Each file is read, typed and checked on its own.

Files of one source may encode a column differently: text as plain values or as dictionary codes, whole numbers of other
widths, times of other units and zones. So each file's columns are cast separately, and an error names the file and the
column. This module does not use Ray: the caller decides where a file's blocks are made.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from cluster.errors import SchemaMismatch, SourceError
from feature_jobs.store.definitions.sources import DTYPES, FileFormat, FileSource
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.declared_types import (
    Roles,
    column_types,
    declared_columns,
    find_zoneless,
    typed_rows,
    typed_text,
)
from feature_jobs.store.ingestion.files import (
    SourceFiles,
    head,
    header,
    parquet_schema,
    parse_json_lines,
    row_group_sizes,
    tables,
)
from feature_jobs.store.ingestion.partitions import partitions_of, with_partitions
from feature_jobs.store.ingestion.validation import RAW, prepare_part, raw_field, time_columns, unique_rules
from feature_jobs.store.types.casting import cast_time
from feature_jobs.store.types.columns import replace_columns
from feature_jobs.store.types.grouping import consecutive_groups
from feature_jobs.store.types.instants import TIME, table_to_utc

HEAD_ROWS = 1000
"""Number of first rows that types are derived from."""
BATCH_ROWS = 131_072
"""Target number of rows of a block."""
BLOCK_VALUES = 8_000_000
"""Target number of values (rows times columns) of a block of a file with many columns."""
PIECE_VALUES = 16_000_000
"""Target number of values that one task reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReader:
    """Reads a source's files as blocks with the same types, which are decided once."""

    files: SourceFiles
    view: FeatureView
    types: Mapping[str, str]
    """Text files: dtype of each column that is not text."""
    names: Sequence[str] = ()
    """JSON lines: the first columns, in order."""
    casts: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Parquet: target type of each column that the files encode differently."""
    unread: frozenset[str] = frozenset()
    """Parquet: columns of incompatible types that the view does not read."""
    zoneless: Sequence[str] = ()
    """Columns of event or created times without a time zone, if the source declares no zone."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Dtype of each column that comes from partition folders."""
    schema: pa.Schema | None = None
    """The columns of all files, with their types. None for a single file, because its blocks have its own schema."""
    num_columns: int = 1
    """Number of columns of the first file."""

    def read_typed(self, path: str, row_groups: Sequence[int] | None = None) -> Iterator[pa.Table]:
        """Yield a file's rows in typed blocks. With `row_groups`, only those of a Parquet file.

        Raises:
            SourceError, SchemaMismatch: the file cannot be read or cast. With several files, the message names it.
        """
        roles, first_number = Roles.of(self.view), 1
        with self.naming_file(path):
            for block in tables(path, self._block_rows(), self.files.source, row_groups=row_groups):
                yield with_partitions(self._typed(block, roles, first_number), path, self.folders, roles)
                first_number += block.num_rows

    def read_head(self, path: str) -> pa.Table:
        """Return a file's first rows with their types. It raises the same errors as `read_typed`."""
        with self.naming_file(path):
            roles = Roles.of(self.view)
            block = self._typed(head(path, HEAD_ROWS, self.files.source), roles, 1)
            return with_partitions(block, path, self.folders, roles)

    def _block_rows(self) -> int:
        """Return the number of rows of a block, which is smaller for a file with many columns."""
        return min(BATCH_ROWS, max(BLOCK_VALUES // max(self.num_columns, 1), 1))

    @contextmanager
    def naming_file(self, path: str) -> Iterator[None]:
        """Add the file's name to an error, if there are several files and the message does not contain it."""
        try:
            yield
        except SourceError as error:
            if len(self.files.paths) == 1 or path in str(error):
                raise
            raise type(error)(f"File {path}: {error}") from error

    def _typed(self, block: pa.Table, roles: Roles, first_number: int) -> pa.Table:
        match self.files.source.kind:
            case FileFormat.parquet | FileFormat.csv if not block.num_rows:
                return block
            case FileFormat.parquet:
                return self._cast(block, roles)
            case FileFormat.csv:
                return typed_text(block, self.types, roles)
            case FileFormat.json:
                rows = parse_json_lines(block["text"].to_pylist(), first_number=first_number)
                return typed_rows(rows, self.types, self.names, roles)

    def _cast(self, block: pa.Table, roles: Roles) -> pa.Table:
        if not self.casts and not self.unread:
            return block
        block = block.drop_columns(sorted(self.unread.intersection(block.column_names)))
        block = table_to_utc(block, self.view.source.zone, time_columns(self.view))
        columns = zip(block.column_names, block.columns, strict=True)
        return replace_columns(
            block,
            {
                name: _cast_column(column, self.casts[name], name, roles)
                for name, column in columns
                if name in self.casts
            },
        )


def block_reader(files: SourceFiles, view: FeatureView, key_types: Mapping[str, str]) -> BlockReader:
    """Decide the types of a source's columns, including columns from partition folders.

    Args:
        files: the source's files.
        view: the view that the files are read for.
        key_types: types of the feature table's join keys.

    Raises:
        SourceError: a file cannot be read.
        SchemaMismatch: a column that the view reads has incompatible types in different files.
    """
    reader, folders = _reader_of_files(files, view, key_types), _folder_columns(files, view, key_types)
    if reader.schema is None or not folders:
        return replace(reader, folders=folders)
    schema = reader.schema
    for name, dtype in folders.items():
        if name not in schema.names:
            schema = schema.append(pa.field(name, DTYPES[dtype]))
    return replace(reader, folders=folders, schema=schema)


def _folder_columns(files: SourceFiles, view: FeatureView, key_types: Mapping[str, str]) -> dict[str, str]:
    """Return the dtypes of the declared columns of partition folders. The first file decides the type of a key."""
    row: dict[str, str | None] = {}
    for path in reversed(files.paths):
        row |= partitions_of(path, declared_columns(view))
    if not row:
        return {}
    types = column_types(view, typed_rows([row], {}), key_types)
    return {name: types.get(name, "string") for name in row}


def _reader_of_files(files: SourceFiles, view: FeatureView, key_types: Mapping[str, str]) -> BlockReader:
    # A file without rows does not show the type of a key.
    with_rows = (path for path, rows in zip(files.paths, files.sizes, strict=True) if rows)
    first = head(next(with_rows, files.paths[0]), HEAD_ROWS, files.source)
    roles = Roles.of(view)
    if files.source.kind is FileFormat.parquet:
        zoneless = find_zoneless(first, roles)
        return replace(_parquet_reader(files, view, zoneless), num_columns=first.num_columns)
    if files.source.kind is FileFormat.json:
        rows = parse_json_lines(first["text"].to_pylist())
        natural_types = native_key_types(rows[0] if rows else {}, view)
        first = typed_rows(rows, natural_types, () if rows else _columns_read(view))
    types = column_types(view, first, key_types)
    schema = None
    if files.source.kind is FileFormat.csv and len(files.paths) > 1:
        names = dict.fromkeys(name for path in files.paths for name in header(path, files.source))
        schema = pa.schema([(name, DTYPES[types.get(name, "string")]) for name in names])
    return BlockReader(
        files=files,
        view=view,
        types=types,
        names=first.column_names,
        zoneless=find_zoneless(first, roles),
        schema=schema,
        num_columns=first.num_columns,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The part of a source that one task reads: some files, or some row groups of one Parquet file."""

    paths: Sequence[str]
    row_groups: Sequence[int] | None = None


def checked_blocks(
    piece: Piece, reader: BlockReader, check: Callable[[pa.Table], pa.Table]
) -> Iterator[pa.Table]:
    """Yield the rows of a piece in blocks, transformed and checked.

    Args:
        piece: part of the source.
        reader: reader of the source.
        check: `prepare_part`, or a function that calls it.

    Raises:
        The errors of `BlockReader.read_typed` and of `check`.
    """
    for path in piece.paths:
        for block in reader.read_typed(path, piece.row_groups):
            with reader.naming_file(path):
                part = check(block)
            if reader.schema is not None:
                position = part.schema.get_field_index(RAW)
                part = part.set_column(position, raw_field(reader.schema), part.column(position))
            yield part


def empty_part(view: FeatureView, names: Sequence[str], *, now: dt.datetime) -> pa.Table:
    """Return the checked block of a source without rows. Only the presence of columns is checked, not their types.

    Raises:
        SchemaMismatch: a column is missing.
    """
    if view.transform is not None:  # the columns that a transform reads are unknown
        view = replace(view, transform=None)
        names = _columns_read(view)
    return prepare_part(pa.table({name: pa.nulls(0) for name in names}), view, now=now)


def split_source(files: SourceFiles, view: FeatureView, *, num_columns: int) -> list[Piece]:
    """Split a source into one piece per task, in order. Small files share a piece. Files without rows are left out.

    Files do not share a piece if a rule needs the source rows themselves, because their types may differ between files.
    """
    limit = max(PIECE_VALUES // max(num_columns, 1), 1)
    pieces: list[Piece] = []
    paths: list[str] = []
    rows = 0
    for path, size in zip(files.paths, files.sizes, strict=True):
        if paths and size and (unique_rules(view) or rows + size > limit):
            pieces.append(Piece(paths=paths))
            paths, rows = [], 0
        if size > limit and files.source.kind is FileFormat.parquet:
            pieces += _split_row_groups(path, files.source, limit)
        elif size:
            paths.append(path)
            rows += size
    return [*pieces, Piece(paths=paths)] if paths else pieces


def _split_row_groups(path: str, source: FileSource, limit: int) -> Iterator[Piece]:
    """Yield pieces of a Parquet file with at most `limit` rows, or with one larger row group."""
    sizes = row_group_sizes(path, source)
    with_rows = [number for number, size in enumerate(sizes) if size]
    for group in consecutive_groups(with_rows, size=sizes.__getitem__, limit=limit):
        yield Piece(paths=[path], row_groups=group)


def native_key_types(row: Mapping[str, Any], view: FeatureView) -> dict[str, str]:
    """Return the dtype of each join key that is a whole number in a row of JSON or SQL."""
    whole = [key for key in view.join_keys if isinstance(row.get(key), int)]
    return dict.fromkeys(whole, "int64")


def _columns_read(view: FeatureView) -> list[str]:
    """Return the source columns that a view reads, except those that its transform reads, which are unknown."""
    fields = [field.name for field in view.schema] if view.transform is None else []
    times = (view.source.event_timestamp, view.source.created_timestamp, view.source.deleted)
    return [*view.join_keys, *fields, *(name for name in times if name)]


def _parquet_reader(files: SourceFiles, view: FeatureView, zoneless: Sequence[str]) -> BlockReader:
    if len(files.paths) == 1:
        return BlockReader(files=files, view=view, types={}, zoneless=zoneless)
    types: dict[str, dict[pa.DataType, str]] = {}  # column -> type -> the first file with that type
    for path, rows in zip(files.paths, files.sizes, strict=True):
        for column in parquet_schema(path, files.source) if rows else ():
            types.setdefault(column.name, {}).setdefault(column.type, path)
    common = {name: _common_type(list(column_types)) for name, column_types in types.items()}
    has_transform = view.transform is not None
    read = set(types) if has_transform else set(_columns_read(view))
    for name in [*view.join_keys, *(types if has_transform else ())]:
        if name in types and common[name] is None:
            examples = " and ".join(f"{kind} in {path}" for kind, path in list(types[name].items())[:2])
            raise SchemaMismatch(f"Column '{name}' is {examples}. Write all files with one type.")
    differing = {name for name, column_types in types.items() if len(column_types) > 1}
    # A field is cast to its dtype from each file's own type: a common type could be too narrow for one of the files.
    cast_by_file = (
        set() if has_transform else {field.name for field in view.schema if common.get(field.name) != TIME}
    )
    return BlockReader(
        files=files,
        view=view,
        types={},
        casts={name: common[name] for name in differing - cast_by_file if common[name] is not None},
        unread=frozenset(name for name in differing if common[name] is None and name not in read),
        zoneless=zoneless,
        schema=pa.schema([(name, kind or pa.string()) for name, kind in common.items()]),
    )


def _common_type(types: Sequence[pa.DataType]) -> pa.DataType | None:
    """Return a type that can represent the values of several types, or None if there is no such type."""
    if len(types) == 1:
        return types[0]
    plain = [_plain_type(kind) for kind in types if not pa.types.is_null(kind)]
    if all(kind == plain[0] for kind in plain):
        return plain[0]
    if all(pa.types.is_timestamp(kind) or pa.types.is_date(kind) for kind in plain):
        return TIME
    try:
        schemas = [pa.schema([("x", kind)]) for kind in plain]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def _cast_column(column: pa.ChunkedArray, target: pa.DataType, name: str, roles: Roles) -> pa.ChunkedArray:
    actual = column.type
    if target == TIME:
        return cast_time(column, name=name, rounding=roles.rounding(name))
    try:
        return (column.cast(actual.value_type) if pa.types.is_dictionary(actual) else column).cast(target)
    except pa.ArrowException as error:
        raise SchemaMismatch(
            f"Column '{name}' is {actual} here and {target} with the other files' types; a value would change. "
            "Write all files with one type."
        ) from error
