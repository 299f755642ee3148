"""Store a large batch in memory that is bounded by one piece of the source and one bucket of the table.

Each Ray task reads one piece of the source, checks its rows, and writes the good rows as part files in the folders of
their buckets. When the batch as a whole has passed its rules, one task per bucket merges the bucket's parts into one
sorted file, and the driver commits these files. So no row passes through Ray's object store or through the driver, and
a task needs memory for `PIECE_VALUES` or for one bucket. The price is that each row is written twice.

The table does not refer to part files. They are removed at the end, also if the batch is refused. The parts of a killed
command are removed by a later ingestion of the view.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cluster.errors import CommitConflict
from feature_jobs.batches.reading import CheckedReader, ReadableSource, require_all_rows, select_range
from feature_jobs.batches.rules import BatchResult, FirstPass, count_rows, find_failures, first_pass
from feature_jobs.batches.storing import (
    StoredBatch,
    commit_batch,
    open_or_create,
    split_rows,
    stored_schema,
    with_time,
)
from feature_jobs.batches.work import Block, Work
from feature_jobs.store.definitions.batch_checks import Unique
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion import profiling
from feature_jobs.store.ingestion.batch_history import PlannedBatch
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.source_blocks import PIECE_VALUES, Piece
from feature_jobs.store.ingestion.validation import (
    REASON,
    SOURCE,
    find_repeated_rows,
    reject,
    unique_rules,
)
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.parts import part_names, read_parts, write_parts
from feature_jobs.store.offline.tables import BucketFile, Target
from feature_jobs.store.types.batch_profile import Distribution, Profile
from feature_jobs.store.types.schema import EVENT, SEQ


class SpooledPiece(NamedTuple):
    """The rows of one piece that belong to one batch."""

    rows: int
    reasons: Counter[str]
    """Number of bad rows by reason."""
    passes: list[FirstPass]
    """Results of the first pass over each block."""
    parts: list[BucketFile]
    """Part files. Their `ingest_seq` is the row's position in the piece."""
    bad: pa.Table
    """Rows for the quarantine, with their positions in the piece."""
    schema: pa.Schema
    """Schema of the stored rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpooledBatch:
    """A batch whose rows are in part files, and the batch rules that it fails."""

    pieces: list[SpooledPiece]
    """In the order of the source."""
    result: BatchResult
    """The profile has no distributions yet."""
    columns: list[str]
    """Columns of the source."""

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def reasons(self) -> dict[str, int]:
        """Number of bad rows by reason."""
        return dict(sum((piece.reasons for piece in self.pieces), Counter[str]()))

    @property
    def rows_bad(self) -> int:
        return sum(self.reasons.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spool:
    """How a task checks a piece and writes its part files, as plain data."""

    reader: CheckedReader
    view: FeatureView
    previous: Mapping[str, Distribution]
    """Distributions of the last good batch."""
    plans: Sequence[PlannedBatch]
    target: Target
    name: str
    """Prefix of the part files of this command."""


@contextmanager
def spooled(
    source: ReadableSource,
    view: FeatureView,
    plans: Sequence[PlannedBatch],
    *,
    target: Target,
    baseline: Profile | None,
    work: Work,
) -> Iterator[dict[str, SpooledBatch]]:
    """Read and check all rows of a source, and write the good rows as part files. Yield the batches by id.

    The part files are removed at the end.

    Args:
        source: the source.
        view: the view that the source is for.
        plans: the batches to store.
        target: the view's table.
        baseline: profile of the last good batch.
        work: runs the steps.

    Raises:
        RefusedError: columns do not fit the view.
        Inconsistent: the number of rows read differs from the source's number of rows.
    """
    with part_names(target.uri) as name:
        command = _Spool(
            reader=source.reader,
            view=view,
            previous={} if baseline is None else baseline.distributions,
            plans=plans,
            target=target,
            name=name,
        )
        yield _spool(command, source, baseline, work)


def _spool(
    command: _Spool, source: ReadableSource, baseline: Profile | None, work: Work
) -> dict[str, SpooledBatch]:
    view = command.view
    rules = unique_rules(view)
    failing = _find_repeated(command, source, rules, work) if rules else None
    calls = (
        (command, number, part.piece, failing, *part.tables) for number, part in enumerate(source.inputs)
    )
    pieces: list[tuple[int, list[SpooledPiece]]] = work.run_all(_spool_piece, calls)
    require_all_rows(view, source, sum(rows for rows, _ in pieces))
    batches = {}
    for number, plan in enumerate(command.plans):
        of_plan = [by_plan[number] for _, by_plan in pieces]
        passes = [block for piece in of_plan for block in piece.passes]
        measured = profiling.profile([block.sketch for block in passes], {}, [])
        findings = find_failures(passes, measured, view, baseline, now=dt.datetime.now(dt.UTC))
        result = BatchResult(profile=measured, findings=findings)
        batches[plan.ingest_id] = SpooledBatch(pieces=of_plan, result=result, columns=source.columns)
    return batches


def store_spooled(
    batch: SpooledBatch, ingest_id: str, *, target: Target, quarantine: QuarantineFiles, work: Work
) -> StoredBatch:
    """Merge the part files into one file per bucket, write the bad rows to quarantine, then commit.

    Raises:
        Inconsistent: the stored and quarantined rows do not add up to the batch's rows; nothing was committed.
        CommitConflict: another job committed at the same time. Nothing was stored.
    """
    schema = batch.pieces[0].schema
    table = open_or_create(target, schema, view=quarantine.view)
    _require_same_buckets(table, target)
    sketches = [block.sketch for piece in batch.pieces for block in piece.passes]
    chosen = profiling.choose_bins(sketches)
    by_bucket: dict[int, list[_Part]] = {}
    bad, first_seq = [], offline.last_seq(table) + 1
    for piece in batch.pieces:
        for file in piece.parts:
            by_bucket.setdefault(file.bucket, []).append(_Part(file.path, first_seq))
        bad.append(_shift_sequence(piece.bad, first_seq))
        first_seq += piece.rows
    name = f"{ingest_id}-{uuid.uuid4().hex[:8]}"
    calls = ((parts, bucket, target, schema, chosen, name) for bucket, parts in sorted(by_bucket.items()))
    merged: list[_MergedBucket] = work.run_all(_merge, calls)
    return commit_batch(
        batch,
        ingest_id,
        table=table,
        files=[bucket.file for bucket in merged],
        bad=with_time(pa.concat_tables(bad)),
        profile=profiling.profile(sketches, chosen, [bucket.counts for bucket in merged]),
        schema=schema,
        quarantine=quarantine,
    )


def _require_same_buckets(table: DeltaTable, target: Target) -> None:
    """Require that the table was not bucketed anew since the part files were written.

    Raises:
        CommitConflict: the table has another number of buckets.
    """
    if offline.num_buckets(table) != target.buckets:
        raise CommitConflict(
            f"{target.uri} was bucketed anew at the same time. Nothing of this batch was stored. Run it again."
        )


class _Part(NamedTuple):
    path: str
    first_seq: int
    """The `ingest_seq` of the first row of the part's piece."""


class _MergedBucket(NamedTuple):
    file: BucketFile
    counts: dict[str, list[int]]
    """By feature: how many values of the bucket are in each bin."""


def _merge(
    parts: Sequence[_Part],
    bucket: int,
    target: Target,
    schema: pa.Schema,
    chosen: Mapping[str, Distribution],
    name: str,
) -> _MergedBucket:
    tables = zip(read_parts([part.path for part in parts], target), parts, strict=True)
    rows = with_time(pa.concat_tables(_shift_sequence(table, part.first_seq) for table, part in tables))
    counts = profiling.count(rows, chosen)
    frame = pl.DataFrame(pl.from_arrow(rows))
    return _MergedBucket(offline.write_bucket(frame, schema, target, bucket=bucket, name=name), counts)


def _shift_sequence(rows: pa.Table, first_seq: int) -> pa.Table:
    """Replace positions by `ingest_seq`."""
    return rows.set_column(rows.num_columns - 1, SEQ, pc.add(rows[SEQ], first_seq))


def _spool_piece(
    command: _Spool,
    number: int,
    piece: Piece | None,
    failing: _FailingRows | None,
    *tables: pa.Table,
) -> tuple[int, list[SpooledPiece]]:
    """Check a piece and write its part files. Return the number of its rows, and its rows by batch."""
    writers = [
        _PartWriter(
            command,
            f"{command.name}-{number}-{index}",
            unique_rules(command.view),
            [] if failing is None else failing[index][number],
        )
        for index in range(len(command.plans))
    ]
    rows = 0
    for block in command.reader.blocks(piece, tables):
        rows += block.num_rows
        for writer, plan in zip(writers, command.plans, strict=True):
            writer.add(_in_batch(block, plan))
    return rows, [writer.finish() for writer in writers]


def _in_batch(block: pa.Table, plan: PlannedBatch) -> pa.Table:
    """Return the rows of a checked block that belong to a batch."""
    return block if plan.event_range is None else select_range(block, plan.event_range)


class _PartWriter:
    """Collects the rows of a piece for one batch, and writes part files whenever there are enough rows.

    Args:
        command: how to write the files.
        name: prefix of the files' names.
        rules: the view's `Unique` rules.
        failing: for each of these rules one bool per row of the piece and batch: true if the rule rejects the row.
    """

    def __init__(
        self, command: _Spool, name: str, rules: Sequence[Unique], failing: Sequence[pa.Array]
    ) -> None:
        self._command, self._name = command, name
        self._rules, self._failing = rules, failing
        self._rows, self._reasons = 0, Counter[str]()
        self._passes: list[FirstPass] = []
        self._pending: list[pa.Table] = []
        self._bad: list[pa.Table] = []
        self._parts: list[BucketFile] = []

    def add(self, block: pa.Table) -> None:
        """Add the batch's rows of a checked block."""
        for rule, mask in zip(self._rules, self._failing, strict=True):
            block = reject(block, mask[self._rows : self._rows + block.num_rows], rule.reason)
        if self._rules:
            block = block.drop_columns([SOURCE])
        self._reasons.update(count_rows(block).reasons)
        self._passes.append(first_pass(block, self._command.view.schema, self._command.previous))
        good, bad = split_rows(block, self._rows)
        self._schema = stored_schema(block.schema)
        self._rows += block.num_rows
        self._bad.append(bad)
        self._pending.append(good)
        if sum(table.num_rows for table in self._pending) * good.num_columns >= PIECE_VALUES:
            self._flush()

    def finish(self) -> SpooledPiece:
        """Write the remaining rows, and return the result."""
        self._flush()
        return SpooledPiece(
            rows=self._rows,
            reasons=self._reasons,
            passes=self._passes,
            parts=self._parts,
            bad=pa.concat_tables(self._bad),
            schema=self._schema,
        )

    def _flush(self) -> None:
        if not any(table.num_rows for table in self._pending):
            return
        rows = pa.concat_tables(self._pending)
        self._pending.clear()
        name = f"{self._name}-{len(self._parts)}"
        self._parts += write_parts(rows, self._command.target, name=name)


_FailingRows = list[list[list[pa.Array]]]
"""By batch, piece and `Unique` rule: one bool per row of the piece and batch, true if the rule rejects the row."""


def _find_repeated(command: _Spool, source: ReadableSource, rules: Sequence[Unique], work: Work) -> Block:
    """Find the rows that break a `Unique` rule within their batch. For this, the source is read once more."""
    names = [*dict.fromkeys([*(name for rule in rules for name in rule.of), EVENT]), REASON]
    keys = [work.run(_select, source.reader, part.piece, names, *part.tables) for part in source.inputs]
    return work.run(_repeated, rules, command.plans, *keys)


def _select(reader: CheckedReader, piece: Piece | None, names: Sequence[str], *tables: pa.Table) -> pa.Table:
    return pa.concat_tables(block.select(names) for block in reader.blocks(piece, tables))


def _repeated(rules: Sequence[Unique], plans: Sequence[PlannedBatch], *pieces: pa.Table) -> _FailingRows:
    return [_repeated_in_batch(rules, [_in_batch(piece, plan) for piece in pieces]) for plan in plans]


def _repeated_in_batch(rules: Sequence[Unique], parts: Sequence[pa.Table]) -> list[list[pa.Array]]:
    """Return for each part one mask per rule. Rows that an earlier rule rejects are ignored by later rules."""
    masks: list[list[pa.Array]] = [[] for _ in parts]
    for rule in rules:
        failing = find_repeated_rows(parts, rule)
        for of_part, mask in zip(masks, failing, strict=True):
            of_part.append(mask)
        parts = tuple(_with_reason(part, mask, rule) for part, mask in zip(parts, failing, strict=True))
    return masks


def _with_reason(part: pa.Table, failing: pa.Array, rule: Unique) -> pa.Table:
    reasons = pc.coalesce(part[REASON], pc.if_else(failing, rule.reason, pa.scalar(None, pa.string())))
    return part.set_column(part.num_columns - 1, REASON, reasons)
