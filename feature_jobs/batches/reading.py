"""From a view's source to its rows, transformed and checked: in this process while few, by Ray Data once many."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import Inconsistent, SourceError
from cluster.session import refusal_behind
from cluster.storage import Layout
from feature_jobs.batches.work import Block, Work
from feature_jobs.store.definitions.sources import BatchSource, SqlSource
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.files import SourceFiles, open_source, size_bytes
from feature_jobs.store.ingestion.profile import Profile
from feature_jobs.store.ingestion.ranges import TimeRange
from feature_jobs.store.ingestion.source_blocks import (
    BATCH_ROWS,
    HEAD_ROWS,
    Shape,
    checked_blocks,
    empty_part,
    grouped,
    natural,
    shape_of,
)
from feature_jobs.store.ingestion.sql import RowDigest, read_chunks
from feature_jobs.store.ingestion.typed import Roles, column_types, declared, typed_rows, zoneless
from feature_jobs.store.ingestion.validation import FILES, prepare_part
from feature_jobs.store.types.key_types import refuse_unlike

if TYPE_CHECKING:
    import ray

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
    zoneless: Sequence[str]


Opened = SourceFiles | SourceRows
Check = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """All rows of a source, transformed and checked one by one."""

    blocks: list[Block]
    columns: list[str]
    """Of the source."""
    zoneless: Sequence[str] = ()
    """Event and created times that have no zone, though the source declares none."""


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
        SourceError: it is missing or unreadable.
        SchemaMismatch: a database's value is not what the view declares.
    """
    if not isinstance(source, SqlSource):
        return open_source(source, places, declared=declared(view))
    digest, types, first, roles, size = RowDigest(), None, None, Roles.of(view), 0
    blocks: list[Block] = []
    names: list[str] = []
    without: list[str] = []
    for rows in read_chunks(source, columns=names):
        if types is None:
            without = zoneless(
                pa.table({name: [rows[0][name]] for name in names if name in roles.instants}), roles
            )
            types = column_types(view, typed_rows(rows[:HEAD_ROWS], natural(rows[0], view)), known)
        table = typed_rows(rows, types, names, roles)
        first = table.slice(0, HEAD_ROWS) if first is None else first
        digest.add(rows)
        was_here, size = not work.in_tasks, size + table.nbytes
        work.expect(digest.rows * table.num_columns, is_large=size > MAX_BYTES_HERE)
        if was_here and work.in_tasks:
            blocks = [work.put(block) for block in blocks]
        blocks.append(work.put(table))
    if first is None:
        first = typed_rows([], column_types(view, typed_rows([], {}, names), known), names, roles)
    return SourceRows(
        blocks=blocks,
        first=first,
        rows=digest.rows,
        digest=digest.hexdigest(),
        names=source.path,
        zoneless=without,
    )


def heads(opened: Opened, view: FeatureView, known: Mapping[str, str]) -> Iterator[pa.Table]:
    """The first rows of every file, typed.

    Raises:
        SourceError, SchemaMismatch: as when all are read.
    """
    if isinstance(opened, SourceRows):
        yield opened.first
        return
    shape = shape_of(opened, view, known)
    yield from map(shape.head, opened.paths)


def prepared(
    opened: Opened,
    view: FeatureView,
    known: Mapping[str, str],
    baseline: Profile | None,
    work: Work,
    *,
    now: dt.datetime,
    ahead: Ahead = FILES,
) -> Prepared:
    """Read, transform and check all rows, here or with Ray Data.

    Raises:
        RefusedError: columns that do not fit the view.
        Inconsistent: another number of rows was read than the source has.
    """
    source = opened if isinstance(opened, SourceRows) else shape_of(opened, view, known)
    first_rows = _checked_heads(source, view, known, now=now, ahead=ahead)
    columns = list(dict.fromkeys(name for first in first_rows for name in first.column_names))
    if opened.rows == 0:
        nothing = empty_part(view, columns, now=now)
        return Prepared(blocks=[work.put(nothing)], columns=columns)
    if isinstance(opened, SourceFiles):
        work.expect(opened.rows * len(columns), is_large=size_bytes(opened.paths) > MAX_BYTES_HERE)

    def check(block: pa.Table) -> pa.Table:
        return prepare_part(block, view, now=now, baseline=baseline, ahead=ahead)

    blocks = _blocks_in_tasks(source, view, check) if work.in_tasks else _blocks_here(source, check)
    rows = sum(work.get([work.run(_num_rows, block, num_cpus=0.1) for block in blocks]))
    if rows != opened.rows:
        raise Inconsistent(f"View '{view.name}': the source has {opened.rows} rows, {rows} were read.")
    return Prepared(blocks=blocks, columns=columns, zoneless=source.zoneless)


def _blocks_here(source: Shape | SourceRows, check: Check) -> list[Block]:
    if isinstance(source, SourceRows):
        return [check(block) for block in source.blocks]
    return list(checked_blocks(source.files.paths, source, check))


def _blocks_in_tasks(source: Shape | SourceRows, view: FeatureView, check: Check) -> list[Block]:
    import ray
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # Else a refusal comes back wrapped in an error of Ray's own, without its cause.
    context.raise_original_map_exception = True
    if isinstance(source, SourceRows):
        checked = _checked(ray.data.from_arrow_refs(source.blocks), check)
    else:
        groups = grouped(source.files, view)
        read = _Read(shape=source, groups=groups, check=check)
        numbers = ray.data.from_items(list(range(len(groups))), override_num_blocks=len(groups))
        if len(source.files.paths) > 1:
            checked = numbers.map_batches(read.checked, batch_size=1)
        else:  # one task reads the file, several check its rows: with equal CPUs Ray would make them one
            checked = _checked(numbers.map_batches(read.typed, batch_size=1, num_cpus=0.5), check)
    try:
        blocks: list[Block] = checked.to_arrow_refs()
    except RayError as error:
        opened = source if isinstance(source, SourceRows) else source.files
        raise unreadable(refusal_behind(error), opened) from error
    return blocks


def _checked(rows: ray.data.Dataset, check: Check) -> ray.data.Dataset:
    return rows.map_batches(check, batch_format="pyarrow", batch_size=BATCH_ROWS, zero_copy_batch=True)


def _checked_heads(
    source: Shape | SourceRows, view: FeatureView, known: Mapping[str, str], *, now: dt.datetime, ahead: Ahead
) -> list[pa.Table]:
    """The first rows of every file, which refuse in a second what does not fit the view."""
    if isinstance(source, SourceRows):
        _check(source.first, view, known, now=now, ahead=ahead)
        return [source.first]
    found = [source.head(path) for path in source.files.paths]
    for path, first in zip(source.files.paths, found, strict=True):
        with source.naming(path):
            _check(first, view, known, now=now, ahead=ahead)
    return found


def _check(
    first: pa.Table, view: FeatureView, known: Mapping[str, str], *, now: dt.datetime, ahead: Ahead
) -> None:
    if first.num_rows:
        refuse_unlike(view.name, prepare_part(first, view, now=now, ahead=ahead).schema, known)
    else:
        empty_part(view, first.column_names, now=now)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """What a task needs to read its files."""

    shape: Shape
    groups: list[list[str]]
    check: Check

    def typed(self, batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            for path in self.groups[int(number)]:
                yield from self.shape.typed(path)

    def checked(self, batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            yield from checked_blocks(self.groups[int(number)], self.shape, self.check)


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
