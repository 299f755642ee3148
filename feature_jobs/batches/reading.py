"""Read, transform and check the rows of a view's source: few rows in this process, many rows with Ray Data."""

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
    BATCH_ROWS,
    HEAD_ROWS,
    BlockReader,
    block_reader,
    checked_blocks,
    empty_part,
    group_files,
    native_key_types,
)
from feature_jobs.store.ingestion.sql import RowDigest, read_chunks
from feature_jobs.store.ingestion.validation import BATCH_LIMIT, prepare_part
from feature_jobs.store.types.batch_profile import Profile
from feature_jobs.store.types.key_types import require_stored_types
from feature_jobs.store.types.schema import EVENT

if TYPE_CHECKING:
    import ray

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
    zoneless: Sequence[str] = ()
    """Columns of event or created times without a time zone, if the source declares no zone."""


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


def read_checked_rows(
    opened: OpenedSource,
    view: FeatureView,
    key_types: Mapping[str, str],
    baseline: Profile | None,
    work: Work,
    *,
    now: dt.datetime,
    ahead: FutureLimit = BATCH_LIMIT,
) -> CheckedSource:
    """Read, transform and check all rows, in this process or with Ray Data.

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
        Inconsistent: the number of rows read differs from the source's number of rows.
    """

    def check(block: pa.Table) -> pa.Table:
        return prepare_part(block, view, now=now, baseline=baseline, ahead=ahead)

    source = opened if isinstance(opened, SourceRows) else block_reader(opened, view, key_types)
    first_rows = _checked_heads(source, view, key_types, check, now=now)
    columns = list(dict.fromkeys(name for first in first_rows for name in first.column_names))
    if opened.rows == 0:
        return CheckedSource(blocks=[work.put(empty_part(view, columns, now=now))], columns=columns)
    if isinstance(opened, SourceFiles):
        work.expect(opened.rows * len(columns), is_large=size_bytes(opened.paths) > MAX_BYTES_HERE)
    blocks = _blocks_in_tasks(source, view, check, work) if work.in_tasks else _blocks_here(source, check)
    rows = sum(work.get([work.run(_num_rows, block, num_cpus=0.1) for block in blocks]))
    if rows != opened.rows:
        raise Inconsistent(f"View '{view.name}': the source has {opened.rows} rows, {rows} were read.")
    return CheckedSource(blocks=blocks, columns=columns, zoneless=source.zoneless)


def _blocks_here(source: BlockReader | SourceRows, check: Check) -> list[Block]:
    if isinstance(source, SourceRows):
        return [check(block) for block in source.blocks]
    return list(checked_blocks(source.files.paths, source, check))


def _blocks_in_tasks(
    source: BlockReader | SourceRows, view: FeatureView, check: Check, work: Work
) -> list[Block]:
    import ray
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = work.selector or None
    context.enable_progress_bars = False
    # Without this, Ray wraps a refusal in its own error, without the cause.
    context.raise_original_map_exception = True
    if isinstance(source, SourceRows):
        checked = _map_checked(ray.data.from_arrow_refs(source.blocks), check)
    else:
        groups = group_files(source.files, view)
        tasks = _ReadTasks(reader=source, groups=groups, check=check)
        numbers = ray.data.from_items(list(range(len(groups))), override_num_blocks=len(groups))
        if len(source.files.paths) > 1:
            checked = numbers.map_batches(tasks.checked, batch_size=1)
        else:
            # One task reads the file, several tasks check its rows. With equal CPUs, Ray would merge both steps.
            checked = _map_checked(numbers.map_batches(tasks.typed, batch_size=1, num_cpus=0.5), check)
    try:
        blocks: list[Block] = checked.to_arrow_refs()
    except RayError as error:
        opened = source if isinstance(source, SourceRows) else source.files
        raise _as_refusal(refusal_behind(error), opened) from error
    return blocks


def _map_checked(rows: ray.data.Dataset, check: Check) -> ray.data.Dataset:
    return rows.map_batches(check, batch_format="pyarrow", batch_size=BATCH_ROWS, zero_copy_batch=True)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _ReadTasks:
    """Functions that Ray tasks run to read groups of files."""

    reader: BlockReader
    groups: list[list[str]]
    check: Check

    def typed(self, batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            for path in self.groups[int(number)]:
                yield from self.reader.read_typed(path)

    def checked(self, batch: Mapping[str, Any]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            yield from checked_blocks(self.groups[int(number)], self.reader, self.check)


def _as_refusal(error: BaseException, opened: OpenedSource) -> BaseException:
    """Turn an I/O error of a task into a SourceError that names the source; return any other error unchanged."""
    from ray.exceptions import RayTaskError

    if not isinstance(error, RayTaskError) or not isinstance(error.cause, OSError | pa.ArrowException):
        return error
    name = ", ".join(opened.paths) if isinstance(opened, SourceFiles) else opened.names
    return SourceError(f"Source {name} cannot be read: {str(error.cause).splitlines()[0]}")


def select_range(block: pa.Table, event_range: TimeRange) -> pa.Table:
    """Return the rows of a checked block whose event time is in a range. Rows without an event time are left out."""
    return block.filter(in_range(block[EVENT], event_range))


def in_range(times: pa.ChunkedArray, time_range: TimeRange) -> pa.ChunkedArray:
    """Return one bool per time: true if it is in a range."""
    start, end = (pa.scalar(bound, times.type) for bound in (time_range.start, time_range.end))
    return pc.and_(pc.greater_equal(times, start), pc.less(times, end))


def _num_rows(block: pa.Table) -> int:
    return int(block.num_rows)
