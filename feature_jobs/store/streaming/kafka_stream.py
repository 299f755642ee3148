"""Store the messages of a topic in a view's feature table, exactly once, and in the online store.

The table stores the offsets: each commit has rows and, as `txn` actions, the offset of each partition after them. So
Kafka's consumer groups are not used, and a consumer starts where the table says. The generation of a consumer is the
time at which it started. Its commits contain the generation, and a consumer that finds a later generation in the table
stops. Before that it does no harm, because Delta accepts only one of two commits from the same offsets.

Messages are checked here or by readers in other processes (`feature_jobs/consumers.py`). They are stored only here, so
the number of readers changes neither the position nor the generation of a stream.

A row goes online after the commit, under its `ingest_seq`. After a crash between these two steps, the next start puts
the table's last batch online.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from deltalake import DeltaTable

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.ledger.events import BatchIngested
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.pushed_rows import ONLINE_FUTURE_LIMIT, POSITION, CheckedRows
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import Batch, Target
from feature_jobs.store.online.events import put_online
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.streaming.checked_messages import CheckedMessages, Message, to_checked
from feature_jobs.store.streaming.lateness import BEGINNING, Lateness, LatePolicy
from feature_jobs.store.streaming.micro_batches import (
    MicroBatch,
    Tally,
    batch_event,
    position,
    refresh,
    store_batch,
    with_sequence,
)
from feature_jobs.store.streaming.pushed_view import PushedView
from feature_jobs.store.types.schema import EVENT, SEQ

GENERATION_APP, BATCH_APP = "falaj.kafka.generation", "falaj.kafka.batch"
"""Application transactions: the generation of the last commit, and the first `ingest_seq` of its last batch."""
_LAST_APP = "falaj.kafka.batch.last"
_NO_ROWS = CheckedRows(
    good=pa.table({POSITION: pa.array([], pa.int64())}),
    bad=pa.table(
        {
            POSITION: pa.array([], pa.int64()),
            "reason": pa.array([], pa.string()),
            "raw": pa.array([], pa.string()),
        }
    ),
)


class Fenced(RefusedError):
    """A consumer that started later took over the view."""


class _LatenessChecked(NamedTuple):
    """Rows after the check for lateness."""

    rows: CheckedRows
    num_late: int
    watermarks: dict[str, int]
    """Watermark after the rows in microseconds, by application id of the partition."""


@dataclass(kw_only=True, slots=True)
class KafkaStream:
    """The stream of one view, committed by one process. Its state in memory can be lost at any time."""

    view: PushedView
    topic: str
    target: Target
    quarantine: QuarantineFiles
    store: OnlineStore
    ledger: Ledger
    actor: str
    lateness: Lateness
    ahead: FutureLimit = ONLINE_FUTURE_LIMIT
    tally: Tally = field(default_factory=Tally)
    _held: list[Message] = field(default_factory=list)
    """Unreadable messages before the first good row. They wait for it, because it decides the table's key types."""
    _table: DeltaTable | None = None
    generation: int = field(default_factory=lambda: time.time_ns() // 1000)

    def start(self) -> None:
        """Claim the view for this generation, and finish a batch that a crash interrupted.

        Raises:
            Fenced: the table has a later generation.
            CommitConflict: another job committed at the same time. Try again.
        """
        table = self._table = offline.open_table(self.target.uri)
        if table is None:
            return
        self._check_generation(table)
        if position(table, BATCH_APP) >= 0:
            self._finish(table)
        if position(table, GENERATION_APP) < self.generation:
            claim = self._batch(_NO_ROWS, {}, offline.last_seq(table) + 1, 0)
            store_batch(table, claim, self.target, quarantine=self.quarantine)

    def offsets(self, partitions: Sequence[int]) -> dict[int, int]:
        """Return the offset from which to read each partition."""
        table = offline.open_table(self.target.uri)
        return {number: position(table, self._offset_app(number)) + 1 for number in partitions}

    def store_messages(self, messages: Sequence[Message]) -> int:
        """Store messages and put their rows online. Messages that the table has are skipped.

        Returns:
            The number of new messages that were stored.

        Raises:
            Fenced: a later generation committed. Nothing was stored.
            CommitConflict: another job committed at the same time. Pass the same messages again.
        """
        table = self._current()
        # Messages in `_held` come before the new ones in their partitions, so they must be stored first.
        fresh = [
            message
            for message in [*self._held, *messages]
            if message.offset() > position(table, self._offset_app(message.partition()))
        ]
        if not fresh:
            return 0
        now = dt.datetime.now(dt.UTC)
        checked = to_checked(fresh, self.view.view, key_types=self.key_types, now=now, ahead=self.ahead)
        if table is None and not checked.rows.good.num_rows:
            self._held = fresh
            return 0
        self._commit(table, checked)
        self._held = []
        return len(fresh)

    def store_checked(self, messages: CheckedMessages) -> int:
        """Do the same as `store_messages` for messages that were already checked with the table's key types.

        Raises:
            Fenced, CommitConflict: as in `store_messages`.
            Inconsistent: the table lacks messages before these. Nothing was stored.
        """
        table = self._current()
        apps = {number: self._offset_app(number) for number in messages.last_offsets}
        fresh = messages.after({number: position(table, app) for number, app in apps.items()})
        if len(fresh):
            self._commit(table, fresh)
        return len(fresh)

    @property
    def key_types(self) -> Mapping[str, str]:
        """The table's key types; empty if there was no table when it was last opened."""
        return offline.stored_key_types(self._table, self.view.spec.join_keys)

    def _current(self) -> DeltaTable | None:
        """Return the newest version of the table, if it still belongs to this generation."""
        table = self._table = refresh(self._table, self.target.uri)
        if table is not None:
            self._check_generation(table)
        return table

    def _commit(self, table: DeltaTable | None, messages: CheckedMessages) -> None:
        """Store messages, put their rows online, and append the ledger event."""
        first = 1 + (-1 if table is None else offline.last_seq(table))
        checked = self._check_lateness(messages, table)
        offsets = {self._offset_app(number): offset for number, offset in messages.last_offsets.items()}
        batch = self._batch(
            checked.rows, offsets | checked.watermarks, first, len(messages), rows_late=checked.num_late
        )
        stored, self._table = store_batch(table, batch, self.target, quarantine=self.quarantine)
        self.tally.add(stored)
        self._put_online(batch.good)
        self._append_event(stored, self._table.version())

    def _batch(
        self,
        checked: CheckedRows,
        positions: Mapping[str, int],
        first: int,
        rows: int,
        *,
        rows_late: int = 0,
    ) -> MicroBatch:
        last = first + rows - 1
        of_batch = {BATCH_APP: first, _LAST_APP: last} if rows else {}
        return MicroBatch(
            ingest_id=f"kafka-{first}-{last}",
            rows_in=rows,
            good=with_sequence(checked.good, first),
            bad=with_sequence(checked.bad, first),
            last_seq=last,
            positions={**positions, **of_batch, GENERATION_APP: self.generation},
            rows_late=rows_late,
        )

    def _check_lateness(self, messages: CheckedMessages, table: DeltaTable | None) -> _LatenessChecked:
        """Find late rows, and move them to the bad rows if the policy is to quarantine them."""
        good = messages.rows.good
        if not good.num_rows:
            return _LatenessChecked(messages.rows, 0, {})
        partitions = messages.partitions[np.array(good[POSITION])]
        events = np.array(good[EVENT].cast(pa.int64()))
        late = np.zeros(good.num_rows, dtype=bool)
        watermarks = {}
        for number in np.unique(partitions).tolist():
            app, in_partition = f"{self._offset_app(number)}.watermark", partitions == number
            watermark = position(table, app)
            late[in_partition], watermarks[app] = self.lateness.find_late(
                events[in_partition].tolist(), BEGINNING if watermark == -1 else watermark
            )
        num_late = int(late.sum())
        if not num_late or self.lateness.policy is LatePolicy.accept:
            return _LatenessChecked(messages.rows, num_late, watermarks)
        positions = good[POSITION].filter(pa.array(late)).to_pylist()
        values = [messages.values[index].as_py() or b"" for index in positions]
        late_rows = pa.table(
            {
                POSITION: pa.array(positions, pa.int64()),
                "reason": ["late"] * num_late,
                "raw": [value.decode(errors="replace") for value in values],
            }
        )
        bad = pa.concat_tables([messages.rows.bad, late_rows]).sort_by(POSITION)
        return _LatenessChecked(CheckedRows(good=good.filter(pa.array(~late)), bad=bad), num_late, watermarks)

    def _finish(self, table: DeltaTable) -> None:
        """Put the last batch online and append its ledger event, in case a crash prevented it."""
        first, last = position(table, BATCH_APP), position(table, _LAST_APP)
        snapshot = offline.snapshot(
            self.target.uri,
            view=self.view.spec.name,
            keys=self.view.spec.join_keys,
            protection=self.target.protection,
            access=self.target.access,
        )
        names = [field.name for field in self.view.spec.stored]
        for bucket in range(snapshot.num_buckets):
            rows = snapshot.read(bucket, names)
            if not rows.is_empty():
                self._put_online(rows.filter(pl.col(SEQ).is_between(first, last)).to_arrow())
        ingest_id = f"kafka-{first}-{last}"
        found = offline.find_batch(table, ingest_id)
        if found is not None and self.ledger.newest(BatchIngested, ingest_id=ingest_id) is None:
            self._append_event(*found)

    def _put_online(self, good: pa.Table) -> None:
        if good.num_rows:
            spec = self.view.spec
            types = offline.key_types(good.schema, spec.join_keys)
            put_online(self.store, spec, types, pl.DataFrame(pl.from_arrow(good)))

    def _append_event(self, batch: Batch, table_version: int) -> None:
        event = batch_event(self.view.spec, f"kafka:{self.topic}", batch, table_version)
        self.ledger.append(event, actor=self.actor)

    def _check_generation(self, table: DeltaTable) -> None:
        """Raise Fenced if the table has a later generation."""
        newest = position(table, GENERATION_APP)
        if newest > self.generation:
            raise Fenced(
                f"View '{self.view.spec.name}' is streamed by a consumer that started later (generation {newest}; this "
                f"one is {self.generation}). This consumer stops."
            )

    def _offset_app(self, partition: int) -> str:
        return f"falaj.kafka.{self.topic}.{partition}"
