"""The steps of a large batch that run in tasks, one for each piece of the source: find repeated rows, write part files.

See `spooling.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.batches.reading import CheckedReader, ReadableSource, select_range
from feature_jobs.batches.rules import FirstPass, count_rows, first_pass, merge_passes
from feature_jobs.batches.storing import split_rows, stored_schema
from feature_jobs.batches.work import Block, Work
from feature_jobs.store.definitions.batch_checks import Unique
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.batch_history import PlannedBatch
from feature_jobs.store.ingestion.source_blocks import PIECE_VALUES, Piece
from feature_jobs.store.ingestion.validation import REASON, SOURCE, find_repeated_rows, reject, unique_rules
from feature_jobs.store.offline.parts import write_parts
from feature_jobs.store.offline.tables import BucketFile, Target
from feature_jobs.store.types.batch_profile import Distribution
from feature_jobs.store.types.schema import EVENT

MAX_PASSES = 64
"""Results of first passes are merged when there are this many."""

FailingRows = list[list[list[pa.Array]]]
"""By batch, piece and `Unique` rule: one bool per row of the piece and batch, true if the rule rejects the row."""


class SpooledPiece(NamedTuple):
    """The rows of one piece that belong to one batch."""

    rows: int
    reasons: Counter[str]
    """Number of bad rows by reason."""
    parts: list[BucketFile]
    """Part files. Their `ingest_seq` is the row's position in the piece."""
    bad: pa.Table | None
    """Rows for the quarantine, with their positions in the piece; None if there are too many in the batch."""
    schema: pa.Schema
    """Schema of the stored rows."""


class CheckedPiece(NamedTuple):
    """The result of a task for one batch."""

    piece: SpooledPiece
    first_pass: FirstPass
    """Of all blocks of the piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spool:
    """How a task checks a piece and writes its part files, as plain data."""

    reader: CheckedReader
    view: FeatureView
    previous: Mapping[str, Distribution]
    """Distributions of the last good batch."""
    plans: Sequence[PlannedBatch]
    target: Target
    name: str
    """Prefix of the part files of this command."""
    max_bad: int
    """A batch with more bad rows is refused, so its bad rows are only counted."""


def spool_piece(
    command: Spool,
    number: int,
    piece: Piece | None,
    failing: FailingRows | None,
    *tables: pa.Table,
) -> tuple[int, list[CheckedPiece]]:
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
            writer.add(in_batch(block, plan))
        while sum(writer.num_pending for writer in writers) >= PIECE_VALUES:
            max(writers, key=lambda writer: writer.num_pending).flush()
    return rows, [writer.finish() for writer in writers]


class _PartWriter:
    """Collects the rows of a piece for one batch, and writes them as part files.

    Args:
        command: how to write the files.
        name: prefix of the files' names.
        rules: the view's `Unique` rules.
        failing: for each of these rules one bool per row of the piece and batch: true if the rule rejects the row.
    """

    def __init__(
        self, command: Spool, name: str, rules: Sequence[Unique], failing: Sequence[pa.Array]
    ) -> None:
        self._command, self._name = command, name
        self._rules, self._failing = rules, failing
        self._rows, self._reasons = 0, Counter[str]()
        self._passes = CollectedPasses()
        self._pending: list[pa.Table] = []
        self.num_pending = 0
        """Number of values that are not written yet."""
        self._bad: list[pa.Table] = []
        self._parts: list[BucketFile] = []

    def add(self, block: pa.Table) -> None:
        """Add the batch's rows of a checked block."""
        if not block.num_rows and self._passes.collected:
            return
        for rule, mask in zip(self._rules, self._failing, strict=True):
            block = reject(block, mask[self._rows : self._rows + block.num_rows], rule.reason)
        if self._rules:
            block = block.drop_columns([SOURCE])
        self._reasons.update(count_rows(block).reasons)
        self._passes.add(first_pass(block, self._command.view.schema, self._command.previous))
        good, bad = split_rows(block, self._rows)
        self._schema = stored_schema(block.schema)
        self._rows += block.num_rows
        self._bad = [*self._bad, bad] if self._reasons.total() <= self._command.max_bad else []
        self._pending.append(good)
        self.num_pending += good.num_rows * good.num_columns

    def finish(self) -> CheckedPiece:
        """Write the remaining rows, and return the result."""
        self.flush()
        piece = SpooledPiece(
            rows=self._rows,
            reasons=self._reasons,
            parts=self._parts,
            bad=pa.concat_tables(self._bad) if self._bad else None,
            schema=self._schema,
        )
        return CheckedPiece(piece, self._passes.merge())

    def flush(self) -> None:
        """Write the rows that are not written yet."""
        if not self.num_pending:
            return
        rows = pa.concat_tables(self._pending)
        self._pending.clear()
        self.num_pending = 0
        name = f"{self._name}-{len(self._parts)}"
        self._parts += write_parts(rows, self._command.target, name=name)


def in_batch(block: pa.Table, plan: PlannedBatch) -> pa.Table:
    """Return the rows of a checked block that belong to a batch."""
    return block if plan.event_range is None else select_range(block, plan.event_range)


class CollectedPasses:
    """Collects results of first passes, and merges them when there are many."""

    def __init__(self) -> None:
        self.collected: list[FirstPass] = []

    def add(self, result: FirstPass) -> None:
        self.collected.append(result)
        if len(self.collected) == MAX_PASSES:
            self.collected = [self.merge()]

    def merge(self) -> FirstPass:
        """Return one result for all."""
        return merge_passes(self.collected)


def find_repeated(command: Spool, source: ReadableSource, rules: Sequence[Unique], work: Work) -> Block:
    """Find the rows that break a `Unique` rule within their batch. For this, the source is read once more."""
    names = [*dict.fromkeys([*(name for rule in rules for name in rule.of), EVENT]), REASON]
    keys = [work.run(_select, source.reader, part.piece, names, *part.tables) for part in source.inputs]
    return work.run(_repeated, rules, command.plans, *keys)


def _select(reader: CheckedReader, piece: Piece | None, names: Sequence[str], *tables: pa.Table) -> pa.Table:
    return pa.concat_tables(block.select(names) for block in reader.blocks(piece, tables))


def _repeated(rules: Sequence[Unique], plans: Sequence[PlannedBatch], *pieces: pa.Table) -> FailingRows:
    return [_repeated_in_batch(rules, [in_batch(piece, plan) for piece in pieces]) for plan in plans]


def _repeated_in_batch(rules: Sequence[Unique], parts: Sequence[pa.Table]) -> list[list[pa.Array]]:
    """Return for each part one mask per rule. Rows that an earlier rule rejects are ignored by later rules."""
    masks: list[list[pa.Array]] = [[] for _ in parts]
    for rule in rules:
        failing = find_repeated_rows(parts, rule)
        for masks_of_part, mask in zip(masks, failing, strict=True):
            masks_of_part.append(mask)
        parts = tuple(_with_reason(part, mask, rule) for part, mask in zip(parts, failing, strict=True))
    return masks


def _with_reason(part: pa.Table, failing: pa.Array, rule: Unique) -> pa.Table:
    reasons = pc.coalesce(part[REASON], pc.if_else(failing, rule.reason, pa.scalar(None, pa.string())))
    return part.set_column(part.num_columns - 1, REASON, reasons)
