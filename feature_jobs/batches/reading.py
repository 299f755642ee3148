"""Read, transform and check the rows of a view's source: few rows in this process, many rows in Ray tasks."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import Inconsistent
from cluster.storage import Layout
from feature_jobs.batches.work import Block, Work
from feature_jobs.store.definitions.sources import BatchSource, SqlSource
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.declared_types import (
    Roles,
    column_types,
    declared_columns,
    find_zoneless,
    typed_rows,
)
from feature_jobs.store.ingestion.files import SourceFiles, open_source, size_bytes
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.ranges import TimeRange
from feature_jobs.store.ingestion.source_blocks import (
    HEAD_ROWS,
    PIECE_VALUES,
    BlockReader,
    Piece,
    block_reader,
    checked_blocks,
    empty_part,
    native_key_types,
    split_source,
)
from feature_jobs.store.ingestion.sql import RowDigest, read_chunks
from feature_jobs.store.ingestion.validation import BATCH_LIMIT, prepare_part
from feature_jobs.store.types.batch_profile import Profile
from feature_jobs.store.types.key_types import require_stored_types
from feature_jobs.store.types.schema import EVENT

MAX_BYTES_HERE = 256 * 2**20
"""Most bytes of a source that this process handles itself: the size of its files, or of a database's rows in memory.
Ray handles larger sources, even if they have few values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRows:
    """The rows of a database. They were read when the source was opened."""

    blocks: list[Block]
    """Typed tables."""
    first: pa.Table
    """The first rows."""
    rows: int
    """Number of rows."""
    digest: str
    names: str
    """The source's name, as events state it."""
    zoneless: Sequence[str]
    """Columns of event or created times without a time zone, if the source declares no zone."""


OpenedSource = SourceFiles | SourceRows
Check = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSource:
    """All rows of a source, transformed and checked one by one."""

    blocks: list[Block]
    columns: list[str]
    """Columns of the source."""


def open_batch(
    view: FeatureView, source: BatchSource, places: Layout, key_types: Mapping[str, str], work: Work
) -> OpenedSource:
    """Find a source and count its rows. A database is read completely.

    Args:
        view: the view that the source is for.
        source: the view's own source, or a file that replaces it.
        places: layout of the storage root.
        key_types: types of the feature table's join keys.
        work: runs the batch's steps.

    Raises:
        SourceError: the source is missing or cannot be read.
        SchemaMismatch: a value of a database does not fit the type that the view declares.
    """
    if isinstance(source, SqlSource):
        return _read_database(view, source, key_types, work)
    return open_source(source, places, declared=declared_columns(view))


def _read_database(
    view: FeatureView, source: SqlSource, key_types: Mapping[str, str], work: Work
) -> SourceRows:
    digest, types, first, roles, num_bytes = RowDigest(), None, None, Roles.of(view), 0
    blocks: list[Block] = []
    names: list[str] = []
    zoneless: list[str] = []
    for rows in read_chunks(source, columns=names):
        if types is None:
            times = {name: [rows[0][name]] for name in names if name in roles.instants}
            zoneless = find_zoneless(pa.table(times), roles)
            head = typed_rows(rows[:HEAD_ROWS], native_key_types(rows[0], view))
            types = column_types(view, head, key_types)
        table = typed_rows(rows, types, names, roles)
        first = table.slice(0, HEAD_ROWS) if first is None else first
        digest.add(rows)
        was_in_tasks, num_bytes = work.in_tasks, num_bytes + table.nbytes
        work.expect(digest.rows * table.num_columns, is_large=num_bytes > MAX_BYTES_HERE)
        if work.in_tasks and not was_in_tasks:
            blocks = [work.put(block) for block in blocks]
        blocks.append(work.put(table))
    if first is None:
        types = column_types(view, typed_rows([], {}, names), key_types)
        first = typed_rows([], types, names, roles)
    return SourceRows(
        blocks=blocks,
        first=first,
        rows=digest.rows,
        digest=digest.hexdigest(),
        names=source.path,
        zoneless=zoneless,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedReader:
    """Reads, transforms and checks rows, in this process or in a task."""

    reader: BlockReader | None
    """Reads the files; None for a database, whose rows were read when the source was opened."""
    check: Check

    def blocks(self, piece: Piece | None, tables: Sequence[pa.Table] = ()) -> Iterator[pa.Table]:
        """Yield checked blocks: the rows of a piece of the files, or the given typed tables of a database."""
        if piece is None or self.reader is None:
            yield from map(self.check, tables)
        else:
            yield from checked_blocks(piece, self.reader, self.check)


class TaskInput(NamedTuple):
    """The part of a source that one task reads."""

    piece: Piece | None
    """The part of the files; None for a database."""
    tables: tuple[Block, ...] = ()
    """The typed tables of a database."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadableSource:
    """A source whose first rows fit the view."""

    reader: CheckedReader
    inputs: list[TaskInput]
    """The parts of the source, in order."""
    rows: int
    """Number of rows of the source."""
    columns: list[str]
    """Columns of the source."""
    zoneless: Sequence[str]
    """Columns of event or created times without a time zone, if the source declares no zone."""


def prepare_source(
    opened: OpenedSource,
    view: FeatureView,
    key_types: Mapping[str, str],
    baseline: Profile | None,
    work: Work,
    *,
    now: dt.datetime,
    ahead: FutureLimit = BATCH_LIMIT,
) -> ReadableSource:
    """Check the first rows of a source, and decide whether this process or Ray tasks read it.

    Args:
        opened: the source.
        view: the view that the source is for.
        key_types: types of the feature table's join keys.
        baseline: profile of the last good batch.
        work: runs the batch's steps.
        now: the time of ingestion.
        ahead: how far times may be ahead of `now`.

    Raises:
        RefusedError: columns do not fit the view.
    """

    def check(block: pa.Table) -> pa.Table:
        return prepare_part(block, view, now=now, baseline=baseline, ahead=ahead)

    source = opened if isinstance(opened, SourceRows) else block_reader(opened, view, key_types)
    first_rows = _checked_heads(source, view, key_types, check, now=now)
    columns = list(dict.fromkeys(name for first in first_rows for name in first.column_names))
    if isinstance(opened, SourceFiles) and opened.rows:
        work.expect(opened.rows * len(columns), is_large=size_bytes(opened.paths) > MAX_BYTES_HERE)
    if opened.rows == 0:
        empty = empty_part(view, columns, now=now)
        reader, inputs = CheckedReader(reader=None, check=lambda _: empty), [TaskInput(None, (empty,))]
    elif isinstance(source, SourceRows):
        reader, inputs = CheckedReader(reader=None, check=check), _group_tables(source, len(columns))
    else:
        reader = CheckedReader(reader=source, check=check)
        inputs = [TaskInput(piece) for piece in split_source(source.files, view, num_columns=len(columns))]
    return ReadableSource(
        reader=reader, inputs=inputs, rows=opened.rows, columns=columns, zoneless=source.zoneless
    )


def read_checked_rows(source: ReadableSource, view: FeatureView, work: Work) -> CheckedSource:
    """Read, transform and check all rows, in this process or in Ray tasks.

    Raises:
        RefusedError: columns do not fit the view.
        Inconsistent: the number of rows read differs from the source's number of rows.
    """
    if work.in_tasks:
        blocks = [work.run(_checked, source.reader, part.piece, *part.tables) for part in source.inputs]
    else:
        blocks = [block for part in source.inputs for block in source.reader.blocks(*part)]
    rows = sum(work.get([work.run(_num_rows, block, num_cpus=0.1) for block in blocks]))
    require_all_rows(view, source, rows)
    return CheckedSource(blocks=blocks, columns=source.columns)


def require_all_rows(view: FeatureView, source: ReadableSource, rows: int) -> None:
    """Require that all rows of a source were read.

    Raises:
        Inconsistent: the number of rows read differs from the source's number of rows.
    """
    if rows != source.rows:
        raise Inconsistent(f"View '{view.name}': the source has {source.rows} rows, {rows} were read.")


def _group_tables(source: SourceRows, num_columns: int) -> list[TaskInput]:
    """Return one input per task for the tables of a database."""
    values = source.rows * num_columns // len(source.blocks)
    size = max(PIECE_VALUES // max(values, 1), 1)
    return [
        TaskInput(None, tuple(source.blocks[first : first + size]))
        for first in range(0, len(source.blocks), size)
    ]


def _checked(reader: CheckedReader, piece: Piece | None, *tables: pa.Table) -> pa.Table:
    return pa.concat_tables(reader.blocks(piece, tables))


def _checked_heads(
    source: BlockReader | SourceRows,
    view: FeatureView,
    key_types: Mapping[str, str],
    check: Check,
    *,
    now: dt.datetime,
) -> list[pa.Table]:
    """Return the first rows of every file. A file that does not fit the view is refused here, within a second."""

    def check_head(first: pa.Table) -> None:
        if first.num_rows:
            require_stored_types(view.name, check(first).schema, key_types)
        else:
            empty_part(view, first.column_names, now=now)

    if isinstance(source, SourceRows):
        check_head(source.first)
        return [source.first]
    first_rows = [source.read_head(path) for path in source.files.paths]
    for path, first in zip(source.files.paths, first_rows, strict=True):
        with source.naming_file(path):
            check_head(first)
    return first_rows


def select_batch(rows: CheckedSource, event_range: TimeRange | None, work: Work) -> CheckedSource:
    """Return the rows whose event time is in a range; None is all rows."""
    if event_range is None:
        return rows
    blocks = [work.run(select_range, block, event_range, num_cpus=0.1) for block in rows.blocks]
    return CheckedSource(blocks=blocks, columns=rows.columns)


def select_range(block: pa.Table, event_range: TimeRange) -> pa.Table:
    """Return the rows of a checked block whose event time is in a range. Rows without an event time are left out."""
    return block.filter(in_range(block[EVENT], event_range))


def in_range(times: pa.ChunkedArray, time_range: TimeRange) -> pa.ChunkedArray:
    """Return one bool per time: true if it is in a range."""
    start, end = (pa.scalar(bound, times.type) for bound in (time_range.start, time_range.end))
    return pc.and_(pc.greater_equal(times, start), pc.less(times, end))


def _num_rows(block: pa.Table) -> int:
    return int(block.num_rows)
