"""The blocks of a source's files: each file is read, typed and checked by itself.

Files of one source may encode a column differently: text plain in one and as codes in another, whole numbers of other
widths, times of other units and zones. So each file's columns are cast by themselves, and what does not fit is refused
by file and column. No Ray in here: a file's blocks are made where the caller wants.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from cluster.errors import SchemaMismatch, SourceError
from feature_jobs.store.definitions.sources import DTYPES, FileFormat
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.files import SourceFiles, head, header, parquet_schema, parsed_lines, tables
from feature_jobs.store.ingestion.partitions import partitions_of, with_partitions
from feature_jobs.store.ingestion.typed import Roles, column_types, declared, typed_rows, typed_text, zoneless
from feature_jobs.store.ingestion.validation import RAW, prepare_part, raw_field, time_columns, unique_rules
from feature_jobs.store.types.casting import cast_time
from feature_jobs.store.types.columns import with_replaced
from feature_jobs.store.types.instants import TIME, zoned

HEAD_ROWS = 1000
BATCH_ROWS = 131_072


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What all blocks of a source are made to be, decided once."""

    files: SourceFiles
    view: FeatureView
    types: Mapping[str, str]
    """Of text files: dtype of each column that is not text."""
    names: Sequence[str] = ()
    """Of JSON lines: columns to begin with."""
    casts: Mapping[str, pa.DataType] = field(default_factory=dict)
    """Of Parquet: type of each column that the files encode differently."""
    unread: frozenset[str] = frozenset()
    """Of Parquet: columns of several kinds that the view does not read."""
    zoneless: Sequence[str] = ()
    """Event and created times that have no zone, though the source declares none."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Dtype of each column that partition folders give."""
    schema: pa.Schema | None = None
    """The types of all files' columns together; None where there is one file, whose blocks say it themselves."""

    def typed(self, path: str) -> Iterator[pa.Table]:
        """A file's rows, typed.

        Raises:
            SourceError, SchemaMismatch: as reading and casting do; where there are several files, naming this one.
        """
        roles, first = Roles.of(self.view), 1
        with self.naming(path):
            for block in tables(path, BATCH_ROWS, self.files.source):
                yield with_partitions(self._typed(block, roles, first), path, self.folders, roles)
                first += block.num_rows

    def head(self, path: str) -> pa.Table:
        """A file's first rows, typed; raises as `typed`."""
        with self.naming(path):
            roles = Roles.of(self.view)
            block = self._typed(head(path, HEAD_ROWS, self.files.source), roles, 1)
            return with_partitions(block, path, self.folders, roles)

    @contextmanager
    def naming(self, path: str) -> Iterator[None]:
        """Say in a refusal which of several files it is about."""
        try:
            yield
        except SourceError as error:
            if len(self.files.paths) == 1 or path in str(error):
                raise
            raise type(error)(f"File {path}: {error}") from error

    def _typed(self, block: pa.Table, roles: Roles, first: int) -> pa.Table:
        match self.files.source.kind:
            case FileFormat.parquet | FileFormat.csv if not block.num_rows:
                return block
            case FileFormat.parquet:
                return self._cast(block, roles)
            case FileFormat.csv:
                return typed_text(block, self.types, roles)
            case FileFormat.json:
                rows = parsed_lines(block["text"].to_pylist(), first=first)
                return typed_rows(rows, self.types, self.names, roles)

    def _cast(self, block: pa.Table, roles: Roles) -> pa.Table:
        if not self.casts and not self.unread:
            return block
        block = block.drop_columns(sorted(self.unread.intersection(block.column_names)))
        block = zoned(block, self.view.source.zone, time_columns(self.view))
        columns = zip(block.column_names, block.columns, strict=True)
        return with_replaced(
            block,
            {
                name: _as(column, self.casts[name], name, roles)
                for name, column in columns
                if name in self.casts
            },
        )


def shape_of(files: SourceFiles, view: FeatureView, known: Mapping[str, str]) -> Shape:
    """Decide the types of a source's columns, those of partition folders among them; raises as `_file_shape`."""
    shape, folders = _file_shape(files, view, known), _folders(files, view, known)
    if shape.schema is None or not folders:
        return replace(shape, folders=folders)
    whole = shape.schema
    for name, dtype in folders.items():
        whole = whole if name in whole.names else whole.append(pa.field(name, DTYPES[dtype]))
    return replace(shape, folders=folders, schema=whole)


def _folders(files: SourceFiles, view: FeatureView, known: Mapping[str, str]) -> dict[str, str]:
    """The declared columns that partition folders give, with their dtypes; the first file decides a key's."""
    rows: dict[str, str | None] = {}
    for path in reversed(files.paths):
        rows |= partitions_of(path, declared(view))
    if not rows:
        return {}
    types = column_types(view, typed_rows([rows], {}), known)
    return {name: types.get(name, "string") for name in rows}


def _file_shape(files: SourceFiles, view: FeatureView, known: Mapping[str, str]) -> Shape:
    """Decide the types of a source's columns.

    Args:
        files: of the source.
        view: whose.
        known: the feature table's join keys and their types.

    Raises:
        SourceError: a file cannot be read.
        SchemaMismatch: a column that the view reads is of different kinds in different files.
    """
    # A file without rows does not say of which type a key is.
    path = next((path for path, rows in zip(files.paths, files.sizes, strict=True) if rows), files.paths[0])
    first = head(path, HEAD_ROWS, files.source)
    if files.source.kind is FileFormat.parquet:
        return _parquet_shape(files, view, zoneless(first, Roles.of(view)))
    if files.source.kind is FileFormat.json:
        rows = parsed_lines(first["text"].to_pylist())
        first = typed_rows(rows, natural(rows[0] if rows else {}, view), () if rows else _declared(view))
    types = column_types(view, first, known)
    schema = None
    if files.source.kind is FileFormat.csv and len(files.paths) > 1:
        names = dict.fromkeys(name for path in files.paths for name in header(path, files.source))
        schema = pa.schema([(name, DTYPES[types.get(name, "string")]) for name in names])
    return Shape(
        files=files,
        view=view,
        types=types,
        names=first.column_names,
        zoneless=zoneless(first, Roles.of(view)),
        schema=schema,
    )


def checked_blocks(
    paths: Sequence[str], shape: Shape, check: Callable[[pa.Table], pa.Table]
) -> Iterator[pa.Table]:
    """Files' rows, transformed and checked by `prepare_part`, or what calls it; raises as `Shape.typed` and that."""
    for path in paths:
        for block in shape.typed(path):
            with shape.naming(path):
                part = check(block)
            if shape.schema is not None:
                position = part.schema.get_field_index(RAW)
                part = part.set_column(position, raw_field(shape.schema), part.column(position))
            yield part


def empty_part(view: FeatureView, names: Sequence[str], *, now: dt.datetime) -> pa.Table:
    """A checked block of a source without rows, whose columns need be there alone: nothing is said of their types.

    Raises:
        SchemaMismatch: a column is missing.
    """
    if view.transform is not None:  # which columns it reads is not known
        names, view = _declared(replace(view, transform=None)), replace(view, transform=None)
    return prepare_part(pa.table({name: pa.nulls(0) for name in names}), view, now=now)


def grouped(files: SourceFiles, view: FeatureView) -> list[list[str]]:
    """Files that are read together, in order: small ones share a task, those without rows are left out.

    Not where a rule needs the source rows themselves, whose types may differ from file to file.
    """
    alone = bool(unique_rules(view))
    groups: list[list[str]] = []
    rows = 0
    for path, size in zip(files.paths, files.sizes, strict=True):
        if not size:
            continue
        if alone or not groups or rows + size > BATCH_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(path)
        rows += size
    return groups


def natural(row: Mapping[str, Any], view: FeatureView) -> dict[str, str]:
    """Of JSON and SQL, keys have a type of their own."""
    whole = [key for key in view.join_keys if isinstance(row.get(key), int)]
    return dict.fromkeys(whole, "int64")


def _declared(view: FeatureView) -> list[str]:
    """The columns of its source that a view reads; those that a transform reads are not known."""
    fields = [field.name for field in view.schema] if view.transform is None else []
    times = (view.source.event_timestamp, view.source.created_timestamp, view.source.deleted)
    return [*view.join_keys, *fields, *(name for name in times if name)]


def _parquet_shape(files: SourceFiles, view: FeatureView, zoneless: Sequence[str]) -> Shape:
    if len(files.paths) == 1:
        return Shape(files=files, view=view, types={}, zoneless=zoneless)
    types: dict[str, dict[pa.DataType, str]] = {}
    filled = [path for path, rows in zip(files.paths, files.sizes, strict=True) if rows]
    for path in filled:
        for column in parquet_schema(path, files.source):
            types.setdefault(column.name, {}).setdefault(column.type, path)
    common = {name: _common(list(of_column)) for name, of_column in types.items()}
    needed = set(_declared(view)) if view.transform is None else set(types)
    for name in [*view.join_keys, *(name for name in types if view.transform is not None)]:
        if name in types and common[name] is None:
            said = " and ".join(f"{kind} in {path}" for kind, path in list(types[name].items())[:2])
            raise SchemaMismatch(f"Column '{name}' is {said}. Write all files with one type.")
    several = {name for name, of_column in types.items() if len(of_column) > 1}
    # A field is cast to its dtype from what each file has: a common type could be too narrow for one of them.
    own = {field.name for field in view.schema if view.transform is None and common.get(field.name) != TIME}
    return Shape(
        files=files,
        view=view,
        types={},
        casts={name: common[name] for name in several - own if common[name] is not None},
        unread=frozenset(name for name in several if common[name] is None and name not in needed),
        zoneless=zoneless,
        schema=pa.schema([(name, kind or pa.string()) for name, kind in common.items()]),
    )


def _common(types: Sequence[pa.DataType]) -> pa.DataType | None:
    """The type that holds what several types hold, None where there is none."""
    if len(types) == 1:
        return types[0]
    plain = [_plain(kind) for kind in types if not pa.types.is_null(kind)]
    if all(kind == plain[0] for kind in plain):
        return plain[0]
    if all(pa.types.is_timestamp(kind) or pa.types.is_date(kind) for kind in plain):
        return TIME
    try:
        one = [pa.schema([("x", kind)]) for kind in plain]
        return pa.unify_schemas(one, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def _as(column: pa.ChunkedArray, target: pa.DataType, name: str, roles: Roles) -> pa.ChunkedArray:
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
