"""Store a view's push log in its feature table, exactly once, and give the online rows their final numbers.

Each row of the log, good or bad, gets one `ingest_seq`, in the order of the log. So within a batch the log's numbers
and the sequence numbers differ by a constant. After a crash, the position in the commit is enough to compute one from
the other. The steps after a commit (final numbers online, ledger event, removal from the log) are idempotent. They are
repeated until the records are removed from the log.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable

from cluster.errors import Inconsistent
from cluster.ledger import Ledger
from cluster.ledger.events import BatchIngested
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.ingestion.pushed_rows import POSITION
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import Batch, Target
from feature_jobs.store.online.events import assign_sequence_online
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.streaming.incompatible_rows import SourceNames, move_incompatible, source_names
from feature_jobs.store.streaming.micro_batches import (
    MAX_ROWS,
    PUSH_APP,
    PUSH_SEQ_APP,
    MicroBatch,
    Tally,
    batch_event,
    position,
    store_batch,
    with_sequence,
)
from feature_jobs.store.streaming.push_log import PushLog, PushRecord
from feature_jobs.store.streaming.pusher import provisional
from feature_jobs.store.types.casting import DECLARED_KEYS


@dataclass(frozen=True, kw_only=True, slots=True)
class PushStream:
    """The stream of one view's pushes. Call `step` repeatedly, in one process or several."""

    view: ViewSpec
    target: Target
    quarantine: QuarantineFiles
    log: PushLog
    store: OnlineStore
    ledger: Ledger
    actor: str
    max_rows: int = MAX_ROWS
    """Number of rows at which a batch is full. The last push in it may exceed the number."""
    tally: Tally = field(default_factory=Tally)

    def step(self) -> int:
        """Store what is in the log, at most one batch; return the number of rows.

        Raises:
            CommitConflict: another job committed at the same time. Try again.
            Inconsistent: the log does not match the table's position.
            RecordLogCorrupt: a record was altered or removed.
        """
        table = offline.open_table(self.target.uri)
        done = position(table, PUSH_APP)
        if table is not None:
            self._finish(table, done, None)
        if self.log.next_number() <= done:
            raise Inconsistent(
                f"View '{self.view.name}': the table has pushed rows up to number {done}, but the push log would "
                "assign that number again. It is not the log that the rows came from. Restore that log."
            )
        records = list(self._next_records(done))
        if not records:
            return 0
        if records[0].first != done + 1:
            raise Inconsistent(
                f"View '{self.view.name}': the push log begins at number {records[0].first}, the table ends at {done}. "
                "The rows in between are lost. Restore the log from a backup."
            )
        records = self._compatible(records, table)
        batch = micro_batch(records, first_seq=1 + (-1 if table is None else offline.last_seq(table)))
        stored, table = store_batch(table, batch, self.target, quarantine=self.quarantine)
        self._finish(table, records[-1].last, stored)
        self.tally.add(stored)
        return batch.rows_in

    def _compatible(self, records: list[PushRecord], table: DeltaTable | None) -> list[PushRecord]:
        """Move the rows that the table cannot take to the bad rows of their records."""
        stored = None if table is None else pa.schema(table.schema().to_arrow())
        declared = {key: DECLARED_KEYS[dtype] for key, dtype in self.view.key_types.items()}
        return move_incompatible(records, stored, declared, self._source_names)

    def _source_names(self, version: str) -> SourceNames:
        return source_names(read_recorded(self.ledger).views[self.view.name, version].definition)

    def _next_records(self, after: int) -> Iterator[PushRecord]:
        """Yield the records of the next batch."""
        num_rows = 0
        for record in self.log.records(after):
            yield record
            num_rows += record.rows
            if num_rows >= self.max_rows:
                return

    def _finish(self, table: DeltaTable, done: int, stored: Batch | None) -> None:
        """Do all steps after a commit, for the records that are still in the log.

        Args:
            table: the table after the commit.
            done: number of the last row in the table.
            stored: the batch that this process has just committed; None to finish what a crash interrupted.
        """
        records = list(itertools.takewhile(lambda record: record.last <= done, self.log.records(-1)))
        if not records:
            return
        shift = position(table, PUSH_SEQ_APP) - done
        self.store.set_key_types(self.view.name, offline.stored_key_types(table, self.view.join_keys))
        for record in self._compatible(records, table):
            self._assign_sequence(record, shift)
        committed = None if stored is None else (stored, table.version())
        unrecorded = committed or self._unrecorded_batch(table, _batch_id(records))
        if unrecorded is not None:
            self.ledger.append(batch_event(self.view, "push", *unrecorded), actor=self.actor)
        self.log.trim(done)

    def _unrecorded_batch(self, table: DeltaTable, ingest_id: str) -> tuple[Batch, int] | None:
        """Return a batch and its table version if the ledger has no event for it."""
        if self.ledger.newest(BatchIngested, ingest_id=ingest_id) is not None:
            return None
        return offline.find_batch(table, ingest_id)

    def _assign_sequence(self, record: PushRecord, shift: int) -> None:
        """Give the online rows of a record their `ingest_seq`, and write the rows that a crash kept offline."""
        if not record.good.num_rows:
            return
        types = offline.key_types(record.good.schema, self.view.join_keys)
        frame = pl.DataFrame(pl.from_arrow(provisional(record.good, record.first)))
        numbers = [record.first + index + shift for index in record.good[POSITION].to_pylist()]
        assign_sequence_online(self.store, self.view, types, frame, numbers)


def micro_batch(records: list[PushRecord], *, first_seq: int) -> MicroBatch:
    """Combine records to one batch of the table.

    Args:
        records: consecutive records of the log.
        first_seq: `ingest_seq` of the first row.
    """
    begin, end = records[0].first, records[-1].last
    shift = first_seq - begin
    good = [with_sequence(record.good, record.first + shift) for record in records]
    bad = [with_sequence(record.bad, record.first + shift) for record in records]
    return MicroBatch(
        ingest_id=_batch_id(records),
        rows_in=end - begin + 1,
        # A record without good rows may have other columns than the table, so it is left out.
        good=pa.concat_tables(
            [rows for rows in good if rows.num_rows] or good[:1], promote_options="permissive"
        ),
        bad=pa.concat_tables(bad),
        last_seq=end + shift,
        positions={PUSH_APP: end, PUSH_SEQ_APP: end + shift},
    )


def _batch_id(records: list[PushRecord]) -> str:
    return f"push-{records[0].first}-{records[-1].last}"
