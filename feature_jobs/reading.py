"""From a view's source to its rows: read here while they are few, by Ray Data's own readers once they are many."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.core import url_to_fs
from pyarrow.fs import FSSpecHandler, PyFileSystem

from cluster.errors import Inconsistent, SourceError
from cluster.session import refusal_behind
from cluster.storage import Layout, is_uri
from feature_jobs.store.definitions import FeatureView
from feature_jobs.store.files import (
    SourceFiles,
    csv_options,
    head,
    open_source,
    parsed_lines,
    size_bytes,
    whole,
)
from feature_jobs.store.profile import Profile
from feature_jobs.store.ranges import TimeRange
from feature_jobs.store.sources import BatchSource, FileFormat, SqlSource
from feature_jobs.store.sql import RowDigest, read_chunks
from feature_jobs.store.typed import column_types, typed_rows, typed_text
from feature_jobs.store.validation import prepare_part
from feature_jobs.work import Block, Work

if TYPE_CHECKING:
    import ray

HEAD_ROWS = 1000
BATCH_ROWS = 131_072
MAX_BYTES_HERE = 256 * 2**20
"""Of files as they lie, or of a database's rows: however few values they are, more than this is for Ray."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRows:
    """The rows of a batch that was read already."""

    blocks: list[Block]
    """Typed tables."""
    first: pa.Table
    rows: int
    digest: str
    names: str


Opened = SourceFiles | SourceRows


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """All rows of a source, transformed and checked one by one."""

    blocks: list[Block]
    columns: list[str]
    """Of the source."""


def open_batch(
    view: FeatureView, source: BatchSource, places: Layout, known: Mapping[str, str], work: Work
) -> Opened:
    """Find, check and count what a source has; a database is read here.

    Args:
        view: whose batch it is.
        source: the view's own, or another file in its place.
        places: where state lies.
        known: the feature table's join keys and their types.
        work: where the batch's steps run.

    Raises:
        SourceError: it is missing, empty or unreadable.
        SchemaMismatch: a database's value is not what the view declares.
    """
    if not isinstance(source, SqlSource):
        return open_source(source, places)
    digest, types, first = RowDigest(), None, None
    blocks: list[Block] = []
    size = 0
    for rows in read_chunks(source):
        if types is None:
            types = column_types(view, typed_rows(rows[:HEAD_ROWS], _natural(rows[0], view)), known)
        table = typed_rows(rows, types)
        first = table.slice(0, HEAD_ROWS) if first is None else first
        digest.add(rows)
        was_here, size = not work.in_tasks, size + table.nbytes
        work.expect(digest.rows * table.num_columns, is_large=size > MAX_BYTES_HERE)
        if was_here and work.in_tasks:
            blocks = [work.put(block) for block in blocks]
        blocks.append(work.put(table))
    if first is None:
        raise SourceError(f"Source {source.path} is empty: no row. Nothing was ingested.")
    return SourceRows(
        blocks=blocks, first=first, rows=digest.rows, digest=digest.hexdigest(), names=source.path
    )


def heads(opened: Opened, view: FeatureView, known: Mapping[str, str]) -> Iterator[pa.Table]:
    """The first rows of every file, typed.

    Raises:
        SourceError, SchemaMismatch: as when all are read.
    """
    if isinstance(opened, SourceRows):
        yield opened.first
        return
    shape = _shape(opened, view, known)
    for path in opened.paths:
        yield shape.typed(head(path, HEAD_ROWS, opened.source))


def dataset(opened: Opened, view: FeatureView, known: Mapping[str, str]) -> ray.data.Dataset:
    """All rows, typed, in the order of the source."""
    import ray

    if isinstance(opened, SourceRows):
        return ray.data.from_arrow_refs(opened.blocks)
    kind, (paths, filesystem) = opened.source.kind, _for_arrow(opened.paths)
    match kind:
        case FileFormat.parquet:
            return ray.data.read_parquet(paths, filesystem=filesystem)
        case FileFormat.csv:
            options = csv_options(opened.paths, opened.source)
            text = ray.data.read_csv(paths, filesystem=filesystem, file_extensions=None, **options)
        case FileFormat.json:
            text = ray.data.read_text(paths, filesystem=filesystem, file_extensions=None)
    shape = _shape(opened, view, known)
    return text.map_batches(shape.typed, batch_format="pyarrow", batch_size=None, zero_copy_batch=True)


def prepared(
    opened: Opened,
    view: FeatureView,
    known: Mapping[str, str],
    baseline: Profile | None,
    work: Work,
    *,
    now: dt.datetime,
) -> Prepared:
    """Read, transform and check all rows, here or with Ray Data.

    Raises:
        RefusedError: columns that do not fit the view.
        Inconsistent: another number of rows was read than the source has.
    """
    if isinstance(opened, SourceFiles):
        columns = len(_shape(opened, view, known).names)
        work.expect(opened.rows * columns, is_large=size_bytes(opened.paths) > MAX_BYTES_HERE)
    read = _prepared_in_tasks if work.in_tasks else _prepared_here
    found = read(opened, view, known, baseline, now=now)
    rows = sum(work.get([work.run(_num_rows, block, num_cpus=0.1) for block in found.blocks]))
    if rows != opened.rows:
        raise Inconsistent(f"View '{view.name}': the source has {opened.rows} rows, {rows} were read.")
    return found


def _prepared_here(
    opened: Opened, view: FeatureView, known: Mapping[str, str], baseline: Profile | None, *, now: dt.datetime
) -> Prepared:
    if isinstance(opened, SourceRows):
        tables = opened.blocks
    else:
        shape = _shape(opened, view, known)
        tables = [shape.typed(whole(path, opened.source)) for path in opened.paths]
    return Prepared(
        blocks=[prepare_part(table, view, now=now, baseline=baseline) for table in tables],
        columns=list(dict.fromkeys(name for table in tables for name in table.column_names)),
    )


def _prepared_in_tasks(
    opened: Opened, view: FeatureView, known: Mapping[str, str], baseline: Profile | None, *, now: dt.datetime
) -> Prepared:
    import ray
    from ray.exceptions import RayError

    first_rows = list(heads(opened, view, known))
    for first in first_rows:
        prepare_part(first, view, now=now)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Else a refusal comes back wrapped in an error of Ray's own, without its cause.
    context.raise_original_map_exception = True
    # The newer reader starts a pool of actors to read footers, which takes longer than a batch of this size.
    context.use_datasource_v2 = False
    checked = dataset(opened, view, known).map_batches(
        lambda block: prepare_part(block, view, now=now, baseline=baseline),
        batch_format="pyarrow",
        batch_size=BATCH_ROWS,
        zero_copy_batch=True,
    )
    try:
        blocks: list[Block] = checked.to_arrow_refs()
    except RayError as error:
        raise unreadable(refusal_behind(error), opened) from error
    columns = list(dict.fromkeys(name for first in first_rows for name in first.column_names))
    return Prepared(blocks=blocks, columns=columns)


def unreadable(error: BaseException, opened: Opened) -> BaseException:
    """An error of reading as a refusal that names the source; any other as it is."""
    from ray.exceptions import RayTaskError

    if not isinstance(error, RayTaskError) or not isinstance(error.cause, OSError | pa.ArrowException):
        return error
    where = ", ".join(opened.paths) if isinstance(opened, SourceFiles) else opened.names
    return SourceError(f"Source {where} cannot be read: {str(error.cause).splitlines()[0]}")


def within(block: pa.Table, range: TimeRange) -> pa.Table:
    """The rows of a prepared block whose event lies in a range; one without a time lies in none."""
    return block.filter(in_range(block["event_timestamp"], range))


def in_range(times: pa.ChunkedArray, range: TimeRange) -> pa.ChunkedArray:
    """Which times lie in a range."""
    start, end = (pa.scalar(one, times.type) for one in (range.start, range.end))
    return pc.and_(pc.greater_equal(times, start), pc.less(times, end))


def _num_rows(block: pa.Table) -> int:
    return int(block.num_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """What blocks of a batch are made to be, decided once."""

    kind: FileFormat
    types: dict[str, str]
    names: list[str]

    def typed(self, block: pa.Table) -> pa.Table:
        match self.kind:
            case FileFormat.parquet:
                return block
            case FileFormat.csv:
                return typed_text(block, self.types)
            case FileFormat.json:
                lines = [line for line in block["text"].to_pylist() if line.strip()]
                return typed_rows(parsed_lines(lines), self.types, self.names)


def _shape(files: SourceFiles, view: FeatureView, known: Mapping[str, str]) -> _Shape:
    first, kind = head(files.paths[0], HEAD_ROWS, files.source), files.source.kind
    if kind is FileFormat.json:
        rows = parsed_lines(first["text"].to_pylist())
        first = typed_rows(rows, _natural(rows[0] if rows else {}, view))
    return _Shape(kind=kind, types=column_types(view, first, known), names=first.column_names)


def _natural(row: Mapping[str, Any], view: FeatureView) -> dict[str, str]:
    """Of JSON and SQL, keys have a type of their own."""
    whole = [key for key in view.join_keys if isinstance(row.get(key), int)]
    return dict.fromkeys(whole, "int64")


def _for_arrow(paths: list[str]) -> tuple[list[str], Any]:
    """Paths and the file system that Ray reads them by; a URI goes through fsspec, as everywhere here."""
    if not is_uri(paths[0]):
        return paths, None
    fs = url_to_fs(paths[0])[0]
    return [url_to_fs(path)[1] for path in paths], PyFileSystem(FSSpecHandler(fs))
