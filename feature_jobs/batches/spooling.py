"""Store a large batch in memory that is bounded by one piece of the source and one bucket of the table.

Each Ray task reads one piece of the source, checks its rows, and writes the good rows as part files in the folders of
their buckets. When the batch as a whole has passed its rules, one task per bucket merges the bucket's parts into one
sorted file, and the driver commits these files. So no row passes through Ray's object store or through the driver, and
a task needs memory for `PIECE_VALUES` or for one bucket. The price is that each row is written twice.

The table does not refer to part files. They are removed at the end, also if the batch is refused. A later large
ingestion of the view, or a rebucketing of its table, removes the parts of a killed command.
"""

from __future__ import annotations

import datetime as dt
import math
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

from cluster.errors import CommitConflict, Inconsistent
from feature_jobs.batches.reading import ReadableSource, require_all_rows
from feature_jobs.batches.rules import BatchResult, find_failures
from feature_jobs.batches.spooled_pieces import (
    CheckedPiece,
    CollectedPasses,
    Spool,
    SpooledPiece,
    find_repeated,
    spool_piece,
)
from feature_jobs.batches.storing import StoredBatch, commit_batch, open_or_create, with_time
from feature_jobs.batches.work import Work
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion import profiling
from feature_jobs.store.ingestion.batch_history import PlannedBatch
from feature_jobs.store.ingestion.profiling import Sketch
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.validation import unique_rules
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.parts import part_names, read_parts, removed_after
from feature_jobs.store.offline.tables import BucketFile, Target
from feature_jobs.store.types.batch_profile import Distribution, Profile
from feature_jobs.store.types.schema import SEQ


@dataclass(frozen=True, kw_only=True, slots=True)
class SpooledBatch:
    """A batch whose rows are in part files, and the batch rules that it fails."""

    pieces: list[SpooledPiece]
    """In the order of the source."""
    sketches: list[Sketch]
    """Sketches of groups of pieces."""
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


@contextmanager
def spooled(
    source: ReadableSource,
    view: FeatureView,
    plans: Sequence[PlannedBatch],
    *,
    target: Target,
    baseline: Profile | None,
    max_bad_share: float,
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
        max_bad_share: maximum share of bad rows of a batch that will be stored.
        work: runs the steps.

    Raises:
        RefusedError: columns do not fit the view.
        Inconsistent: the number of rows read differs from the source's number of rows.
    """
    with part_names(target.uri) as name:
        command = Spool(
            reader=source.reader,
            view=view,
            previous={} if baseline is None else baseline.distributions,
            plans=plans,
            target=target,
            name=name,
            max_bad=math.ceil(max_bad_share * source.rows),
        )
        yield _spool(command, source, baseline, work)


def _spool(
    command: Spool, source: ReadableSource, baseline: Profile | None, work: Work
) -> dict[str, SpooledBatch]:
    view = command.view
    rules = unique_rules(view)
    failing = find_repeated(command, source, rules, work) if rules else None
    calls = (
        (command, number, part.piece, failing, *part.tables) for number, part in enumerate(source.inputs)
    )
    collected = [_CollectedBatch(command.max_bad) for _ in command.plans]
    rows = 0
    for rows_of_piece, by_plan in work.run_all(spool_piece, calls):
        rows += rows_of_piece
        for batch, checked in zip(collected, by_plan, strict=True):
            batch.add(checked)
    require_all_rows(view, source, rows)
    batches = {}
    for plan, batch in zip(command.plans, collected, strict=True):
        passes = batch.passes.collected
        sketches = [each.sketch for each in passes]
        measured = profiling.profile(sketches, {}, [])
        findings = find_failures(passes, measured, view, baseline, now=dt.datetime.now(dt.UTC))
        result = BatchResult(profile=measured, findings=findings)
        batches[plan.ingest_id] = SpooledBatch(
            pieces=batch.pieces, sketches=sketches, result=result, columns=source.columns
        )
    return batches


class _CollectedBatch:
    """Collects the pieces of a batch, without its bad rows if there are more than `max_bad`."""

    def __init__(self, max_bad: int) -> None:
        self.pieces: list[SpooledPiece] = []
        self.passes = CollectedPasses()
        self._max_bad, self._num_bad = max_bad, 0

    def add(self, checked: CheckedPiece) -> None:
        self.passes.add(checked.first_pass)
        self.pieces.append(checked.piece)
        self._num_bad += checked.piece.reasons.total()
        if self._num_bad > self._max_bad:
            self.pieces = [each._replace(bad=None) for each in self.pieces]


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
    chosen = profiling.choose_bins(batch.sketches)
    by_bucket: dict[int, list[_Part]] = {}
    bad, first_seq = [], offline.last_seq(table) + 1
    for piece in batch.pieces:
        for file in piece.parts:
            by_bucket.setdefault(file.bucket, []).append(_Part(file.path, first_seq))
        if piece.bad is not None:
            bad.append(_shift_sequence(piece.bad, first_seq))
        first_seq += piece.rows
    name = f"{ingest_id}-{uuid.uuid4().hex}"
    calls = ((parts, bucket, target, schema, chosen, name) for bucket, parts in sorted(by_bucket.items()))
    with removed_after(target.uri, name, BaseException):
        merged: list[_MergedBucket] = list(work.run_all(_merge, calls))
    with removed_after(target.uri, name, CommitConflict, Inconsistent):
        return commit_batch(
            batch,
            ingest_id,
            table=table,
            files=[bucket.file for bucket in merged],
            bad=with_time(pa.concat_tables(bad)),
            profile=profiling.profile(batch.sketches, chosen, [bucket.counts for bucket in merged]),
            schema=schema,
            quarantine=quarantine,
        )


def _require_same_buckets(table: DeltaTable, target: Target) -> None:
    """Require that the part files were written for the table's number of buckets.

    Raises:
        CommitConflict: the table has another number of buckets.
    """
    if offline.num_buckets(table) != target.buckets:
        raise CommitConflict(
            f"{target.uri} was created or rebucketed by another job at the same time. Nothing of this batch was "
            "stored. Run it again."
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
