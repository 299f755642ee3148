"""From a topic into a view's feature table, exactly once, and online.

Offsets are kept by the table: a commit holds its rows and, as `txn` actions, the offset of each partition behind them.
So Kafka's own groups are not used; whoever starts goes on where the table says. A consumer has a generation, the moment
it started, which its commits state: one that finds a later generation in the table is a zombie and ends. Until then it
does no harm either, because of two commits from the same offsets Delta takes one.

Messages are checked here, or by readers elsewhere (`feature_jobs/consumers.py`). They are stored only here, so how many
read changes nothing about where a stream is and whose.

A row goes online after the commit, under its `ingest_seq`. A crash between the two is mended at the next start, from
the last batch in the table.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.ledger.events import BatchIngested
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.pushed_rows import AT_ONCE, POSITION, CheckedRows
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import Batch, Target
from feature_jobs.store.online.events import put_online
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.streaming.checked_messages import CheckedMessages, Message, checked
from feature_jobs.store.streaming.lateness import BEGINNING, Lateness, LatePolicy
from feature_jobs.store.streaming.pushed_view import PushedView
from feature_jobs.store.streaming.streamed import MicroBatch, Tally, event_of, newest, position, store_batch
from feature_jobs.store.types.schema import EVENT, SEQ

GENERATION_APP, BATCH_APP = "falaj.kafka.generation", "falaj.kafka.batch"
"""Application transactions: the generation that committed last, and the first `ingest_seq` of its last batch."""
_LAST_APP = "falaj.kafka.batch.last"


class Fenced(RefusedError):
    """Another consumer started since."""


@dataclass(kw_only=True, slots=True)
class KafkaStream:
    """Of one view, committed by one process. What it holds in memory can be lost at any time."""

    view: PushedView
    topic: str
    target: Target
    quarantine: str
    store: OnlineStore
    ledger: Ledger
    actor: str
    lateness: Lateness
    ahead: Ahead = AT_ONCE
    tally: Tally = field(default_factory=Tally)
    _held: list[Message] = field(default_factory=list)
    """Unreadable ones from before the first row, which says what the table's keys are."""
    _table: DeltaTable | None = None
    generation: int = field(default_factory=lambda: time.time_ns() // 1000)

    def start(self) -> None:
        """Claim the view for this generation, and mend what a crash left half done.

        Raises:
            Fenced: a later generation is there already.
            CommitConflict: another job committed meanwhile; try again.
        """
        table = self._table = offline.open_table(self.target.uri)
        if table is None:
            return
        self._check_generation(table)
        if position(table, BATCH_APP) >= 0:
            self._finish(table)
        if position(table, GENERATION_APP) < self.generation:
            last, nothing = offline.last_seq(table), pa.table({POSITION: pa.array([], pa.int64())})
            claim = self._batch(_no_rows(nothing), {}, last + 1, 0)
            store_batch(table, claim, self.target, view=self.view.spec, quarantine=self.quarantine)

    def offsets(self, partitions: Sequence[int]) -> dict[int, int]:
        """Where to go on, by partition."""
        table = offline.open_table(self.target.uri)
        return {number: position(table, self._offset_app(number)) + 1 for number in partitions}

    def take(self, messages: Sequence[Message]) -> int:
        """Store messages and put them online; those that the table has already are passed over; gives how many.

        Raises:
            Fenced: a later generation committed; nothing was stored.
            CommitConflict: another job committed meanwhile; take the same messages again.
        """
        table = self._current()
        # Those that are held stand before these in their partitions, so they must not be left behind.
        fresh = [
            one
            for one in [*self._held, *messages]
            if one.offset() > position(table, self._offset_app(one.partition()))
        ]
        if not fresh:
            return 0
        now = dt.datetime.now(dt.UTC)
        found = checked(fresh, self.view.view, key_types=self.key_types, now=now, ahead=self.ahead)
        if table is None and not found.rows.good.num_rows:
            self._held = fresh
            return 0
        self._commit(table, found)
        self._held = []
        return len(fresh)

    def store_checked(self, messages: CheckedMessages) -> int:
        """As `take`, for messages that were checked with the table's types of keys.

        Raises:
            Fenced, CommitConflict: as `take`.
            Inconsistent: the table lacks messages before these; nothing was stored.
        """
        table = self._current()
        apps = {number: self._offset_app(number) for number in messages.reached}
        fresh = messages.after({number: position(table, app) for number, app in apps.items()})
        if len(fresh):
            self._commit(table, fresh)
        return len(fresh)

    @property
    def key_types(self) -> Mapping[str, str]:
        """How the table stores keys; nothing where there was none when it was looked at last."""
        return offline.stored_key_types(self._table, self.view.spec.join_keys)

    def _current(self) -> DeltaTable | None:
        """The table as it is now, if it is still this generation's."""
        table = self._table = newest(self._table, self.target.uri)
        if table is not None:
            self._check_generation(table)
        return table

    def _commit(self, table: DeltaTable | None, messages: CheckedMessages) -> None:
        """Store, put online, tell the ledger."""
        first = 1 + (-1 if table is None else offline.last_seq(table))
        rows, rows_late, watermarks = self._judged(messages, table)
        reached = {self._offset_app(number): offset for number, offset in messages.reached.items()}
        batch = self._batch(rows, reached | watermarks, first, len(messages), rows_late=rows_late)
        stored, self._table = store_batch(
            table, batch, self.target, view=self.view.spec, quarantine=self.quarantine
        )
        self.tally.add(stored)
        self._put_online(batch.good)
        self._tell(stored, self._table.version())

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
            good=_numbered(checked.good, first),
            bad=_numbered(checked.bad, first),
            last_seq=last,
            positions={**positions, **of_batch, GENERATION_APP: self.generation},
            rows_late=rows_late,
        )

    def _judged(
        self, messages: CheckedMessages, table: DeltaTable | None
    ) -> tuple[CheckedRows, int, dict[str, int]]:
        """Late rows counted or put aside, and the partitions' watermarks behind them."""
        good = messages.rows.good
        if not good.num_rows:
            return messages.rows, 0, {}
        partitions = messages.partitions[np.array(good[POSITION])]
        events = np.array(good[EVENT].cast(pa.int64()))
        late = np.zeros(good.num_rows, dtype=bool)
        watermarks = {}
        for number in np.unique(partitions).tolist():
            app, mine = f"{self._offset_app(number)}.watermark", partitions == number
            known = position(table, app)
            late[mine], watermarks[app] = self.lateness.judge(
                events[mine].tolist(), BEGINNING if known == -1 else known
            )
        count = int(late.sum())
        if not count or self.lateness.policy is LatePolicy.accept:
            return messages.rows, count, watermarks
        places = good[POSITION].filter(pa.array(late)).to_pylist()
        raw = [(messages.values[place].as_py() or b"").decode(errors="replace") for place in places]
        aside = pa.table({POSITION: pa.array(places, pa.int64()), "reason": ["late"] * count, "raw": raw})
        bad = pa.concat_tables([messages.rows.bad, aside]).sort_by(POSITION)
        return CheckedRows(good=good.filter(pa.array(~late)), bad=bad), count, watermarks

    def _finish(self, table: DeltaTable) -> None:
        """Put the last batch online and tell the ledger of it, which a crash may have prevented."""
        first, last = position(table, BATCH_APP), position(table, _LAST_APP)
        snapshot = offline.snapshot(
            self.target.uri,
            view=self.view.spec.name,
            keys=self.view.spec.join_keys,
            protection=self.target.protection,
            access=self.target.access,
        )
        names = [one.name for one in self.view.spec.stored]
        for bucket in range(snapshot.num_buckets):
            rows = snapshot.read(bucket, names)
            if not rows.is_empty():
                self._put_online(rows.filter(pl.col(SEQ).is_between(first, last)).to_arrow())
        ingest_id = f"kafka-{first}-{last}"
        found = offline.find_batch(table, ingest_id)
        told = (entry.payload["ingest_id"] == ingest_id for entry in self.ledger.entries(BatchIngested))
        if found is not None and not any(told):
            self._tell(*found)

    def _put_online(self, good: pa.Table) -> None:
        if good.num_rows:
            spec = self.view.spec
            types = offline.key_types(good.schema, spec.join_keys)
            put_online(self.store, spec, types, pl.DataFrame(pl.from_arrow(good)))

    def _tell(self, batch: Batch, table_version: int) -> None:
        event = event_of(self.view.spec, f"kafka:{self.topic}", batch, table_version)
        self.ledger.append(event, actor=self.actor)

    def _check_generation(self, table: DeltaTable) -> None:
        there = position(table, GENERATION_APP)
        if there > self.generation:
            raise Fenced(
                f"View '{self.view.spec.name}' is streamed by a consumer that started later (generation {there}, this "
                f"one is {self.generation}). This one ends."
            )

    def _offset_app(self, partition: int) -> str:
        return f"falaj.kafka.{self.topic}.{partition}"


def _numbered(rows: pa.Table, first: int) -> pa.Table:
    numbers = pc.add(rows[POSITION], first)
    return rows.drop_columns([POSITION]).append_column(SEQ, numbers)


def _no_rows(nothing: pa.Table) -> CheckedRows:
    return CheckedRows(
        good=nothing,
        bad=nothing.append_column("reason", pa.array([], pa.string())).append_column(
            "raw", pa.array([], pa.string())
        ),
    )
