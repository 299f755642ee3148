"""From a view's push log into its feature table, exactly once, and the rows' final numbers into the online store.

Every row of the log, good or bad, takes one `ingest_seq`, in the log's order. So a batch's numbers and sequence numbers
run side by side, and the position that the commit states is enough to know the one from the other after a crash. What
follows a commit (final numbers online, the ledger's event, freeing the log) can be done again, and is, until the log is
freed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cluster.errors import Inconsistent
from cluster.ledger import Ledger
from cluster.ledger.events import BatchIngested
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.ingestion.pushed_rows import POSITION
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import Batch, Target
from feature_jobs.store.online.events import settle_online
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.streaming.push_log import PushLog, PushRecord
from feature_jobs.store.streaming.pusher import provisional
from feature_jobs.store.streaming.streamed import (
    PUSH_APP,
    PUSH_SEQ_APP,
    MicroBatch,
    Tally,
    event_of,
    position,
    store_batch,
)
from feature_jobs.store.streaming.unfit import SourceNames, set_aside, source_names
from feature_jobs.store.types.casting import DECLARED_KEYS
from feature_jobs.store.types.schema import SEQ


@dataclass(frozen=True, kw_only=True, slots=True)
class PushStream:
    """Of one view; `step` again and again, in one process or several."""

    view: ViewSpec
    target: Target
    quarantine: str
    log: PushLog
    store: OnlineStore
    ledger: Ledger
    actor: str
    max_rows: int = 50_000
    """Of one batch, but for the last push in it."""
    tally: Tally = field(default_factory=Tally)

    def step(self) -> int:
        """Take what is in the log, once; gives how many rows.

        Raises:
            CommitConflict: another job committed meanwhile; try again.
            Inconsistent: the log is not the one that the table's position is of.
            RecordLogCorrupt: a record was altered or taken out.
        """
        table = offline.open_table(self.target.uri)
        done = position(table, PUSH_APP)
        if table is not None:
            self._finish(table, done, None)
        if self.log.next_number() <= done:
            raise Inconsistent(
                f"View '{self.view.name}': the table has pushed rows up to number {done}, the push log would give that "
                "number again. It is not the log the rows came from: restore that one."
            )
        records = list(self._take(done))
        if not records:
            return 0
        if records[0].first != done + 1:
            raise Inconsistent(
                f"View '{self.view.name}': the push log begins at number {records[0].first}, the table ends at {done}. "
                "What lies between was lost. Restore the log from a backup."
            )
        records = self._fitting(records, table)
        batch = micro_batch(records, first_seq=1 + (-1 if table is None else offline.last_seq(table)))
        stored, table = store_batch(table, batch, self.target, view=self.view, quarantine=self.quarantine)
        self._finish(table, records[-1].last, stored)
        self.tally.add(stored)
        return batch.rows_in

    def _fitting(self, records: list[PushRecord], table: DeltaTable | None) -> list[PushRecord]:
        """The records, with rows that the table cannot take among the bad ones."""
        stored = None if table is None else pa.schema(table.schema().to_arrow())
        declared = {key: DECLARED_KEYS[dtype] for key, dtype in self.view.key_types.items()}
        return set_aside(records, stored, declared, self._source_names)

    def _source_names(self, version: str) -> SourceNames:
        return source_names(read_recorded(self.ledger).views[self.view.name, version].definition)

    def _take(self, after: int) -> Iterator[PushRecord]:
        taken = 0
        for record in self.log.records(after):
            yield record
            taken += record.rows
            if taken >= self.max_rows:
                return

    def _finish(self, table: DeltaTable, done: int, stored: Batch | None) -> None:
        """All that follows a commit, for the records that are still in the log.

        Args:
            table: behind the commit.
            done: number of the last row in it.
            stored: what this process just stored; none to mend what a crash left.
        """
        records = list(itertools.takewhile(lambda record: record.last <= done, self.log.records(-1)))
        if not records:
            return
        shift = position(table, PUSH_SEQ_APP) - done
        self.store.hold_key_types(self.view.name, offline.stored_key_types(table, self.view.join_keys))
        for record in self._fitting(records, table):
            self._settle(record, shift)
        event = self._untold(table, _batch_id(records)) if stored is None else (stored, table.version())
        if event is not None:
            self.ledger.append(event_of(self.view, "push", *event), actor=self.actor)
        self.log.trim(done)

    def _untold(self, table: DeltaTable, ingest_id: str) -> tuple[Batch, int] | None:
        """A batch in the table, with its version, that the ledger has no event of."""
        if any(entry.payload["ingest_id"] == ingest_id for entry in self.ledger.entries(BatchIngested)):
            return None
        return offline.find_batch(table, ingest_id)

    def _settle(self, record: PushRecord, shift: int) -> None:
        """Give a record's rows their numbers online, and put there what a crash kept from it."""
        if not record.good.num_rows:
            return
        types = offline.key_types(record.good.schema, self.view.join_keys)
        frame = pl.DataFrame(pl.from_arrow(provisional(record.good, record.first)))
        numbers = [record.first + place + shift for place in record.good[POSITION].to_pylist()]
        settle_online(self.store, self.view, types, frame, numbers)


def micro_batch(records: list[PushRecord], *, first_seq: int) -> MicroBatch:
    """Records as one batch of the table."""
    begin, end = records[0].first, records[-1].last
    shift = first_seq - begin
    good = [_numbered(record.good, record.first + shift) for record in records]
    bad = [_numbered(record.bad, record.first + shift) for record in records]
    return MicroBatch(
        ingest_id=_batch_id(records),
        rows_in=end - begin + 1,
        # One without a good row may have other columns than the table.
        good=pa.concat_tables(
            [rows for rows in good if rows.num_rows] or good[:1], promote_options="permissive"
        ),
        bad=pa.concat_tables(bad),
        last_seq=end + shift,
        positions={PUSH_APP: end, PUSH_SEQ_APP: end + shift},
    )


def _batch_id(records: list[PushRecord]) -> str:
    return f"push-{records[0].first}-{records[-1].last}"


def _numbered(rows: pa.Table, first: int) -> pa.Table:
    numbers = pc.add(rows[POSITION], first)
    return rows.drop_columns([POSITION]).append_column(SEQ, numbers)
