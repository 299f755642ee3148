"""Small batches of a stream into a feature table, and how far streams have come.

The position is said by the table's own commits (`txn` actions), so data and position cannot differ: killed between
anything and anything, a stream begins again where the table says, and nothing is lost or there twice. Files without a
commit are dead weight.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
from deltalake import DeltaTable

from cluster.errors import CommitConflict, Inconsistent
from cluster.ledger.events import BatchIngested
from cluster.security.encryption.access import protected_files
from feature_jobs.store.catalog.protection import quarantine_place, quarantine_protection
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import INGESTED, TIMESTAMP, Batch, Target, last_seq
from feature_jobs.store.online.rows import Horizon

PUSH_APP, PUSH_SEQ_APP = "falaj.push", "falaj.push.seq"
"""Application transactions: the last row of the push log that the table has, and its `ingest_seq`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Rows of a stream, validated, with their `ingest_seq`."""

    ingest_id: str
    rows_in: int
    good: pa.Table
    bad: pa.Table
    """`reason`, `raw`, `ingest_seq`."""
    last_seq: int
    positions: Mapping[str, int]
    """How far the stream has come with it, by application id."""
    rows_late: int = 0


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of the rows that one run of a stream took."""

    stored: int = 0
    quarantined: int = 0
    late: int = 0
    """Stored or quarantined, by the policy."""
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, batch: Batch) -> None:
        """Count a batch that was committed."""
        self.stored += batch.rows_stored
        self.quarantined += batch.rows_quarantined
        self.late += batch.rows_late
        self.reasons.update(batch.reasons)


def horizon(table: DeltaTable) -> Horizon:
    """What of the online store is in this version of the table."""
    return Horizon(seq=last_seq(table), offset=position(table, PUSH_APP))


def position(table: DeltaTable | None, app: str) -> int:
    """How far a stream has come, -1 at its beginning."""
    number = None if table is None else table.transaction_version(app)
    return -1 if number is None else int(number)


def newest(table: DeltaTable | None, uri: str) -> DeltaTable | None:
    """A table as it is now, none where there is none; one that is known reads only what its log has more."""
    if table is None:
        return offline.open_table(uri)
    table.update_incremental()
    return table


def store_batch(
    table: DeltaTable | None, rows: MicroBatch, target: Target, *, view: ViewSpec, quarantine: str
) -> tuple[Batch, DeltaTable]:
    """Write a batch's files and commit them together with the position; gives the table as it is then.

    Args:
        table: as it was when the position was read from it; none where there is none yet.
        rows: what to store.
        target: the table.
        view: whose.
        quarantine: folder of the view's.

    Raises:
        CommitConflict: another job committed meanwhile; nothing was stored.
        SchemaMismatch: a column has another type than the table's.
        Inconsistent: rows in are not good and bad ones; nothing was stored.
    """
    if rows.good.num_rows + rows.bad.num_rows != rows.rows_in:
        raise Inconsistent(
            f"View '{view.name}': {rows.rows_in} rows in are not {rows.good.num_rows} good + {rows.bad.num_rows} bad. "
            "Nothing was committed."
        )
    now = pa.scalar(dt.datetime.now(dt.UTC), TIMESTAMP)
    good = rows.good.append_column(INGESTED, pa.repeat(now, rows.good.num_rows))
    before = _standing(table, rows.positions)
    table = _fitting(table, good, target, view=view.name)
    if _standing(table, rows.positions) != before:
        raise CommitConflict(
            f"Another job streamed into {target.uri} meanwhile; nothing was stored. Run it again."
        )
    name = f"{rows.ingest_id}-{uuid.uuid4().hex[:8]}"
    files = offline.write_files(good, target, name=name) if good.num_rows else []
    said = f"{rows.ingest_id}.parquet" if rows.bad.num_rows else None
    if said is not None:
        bad = rows.bad.append_column(INGESTED, pa.repeat(now, rows.bad.num_rows))
        place = quarantine_place(view.name, rows.ingest_id)
        protected_files(target.access).write(
            bad, f"{quarantine}/{said}", quarantine_protection(view.name), place=place
        )
    batch = Batch(
        ingest_id=rows.ingest_id,
        rows_in=rows.rows_in,
        rows_stored=good.num_rows,
        rows_quarantined=rows.bad.num_rows,
        reasons=dict(Counter(rows.bad["reason"].to_pylist())),
        quarantine=said,
        rows_late=rows.rows_late,
    )
    schema = good.schema if good.num_rows else _table_schema(table)
    offline.commit(table, schema, files, batch, seq=rows.last_seq, positions=rows.positions)
    return batch, DeltaTable(target.uri)


def event_of(view: ViewSpec, source: str, batch: Batch, table_version: int) -> BatchIngested:
    """What is said in the ledger of a batch that is in the table."""
    return BatchIngested(
        view=view.name,
        view_version=view.version,
        ingest_id=batch.ingest_id,
        source=source,
        source_digest=f"{source}:{batch.ingest_id}",
        rows_in=batch.rows_in,
        rows_stored=batch.rows_stored,
        rows_quarantined=batch.rows_quarantined,
        table_version=table_version,
        reasons=batch.reasons,
        quarantine=batch.quarantine,
        rows_late=batch.rows_late,
    )


def _standing(table: DeltaTable | None, positions: Mapping[str, int]) -> list[int]:
    """What the positions and sequence numbers of a batch were read off."""
    return [-1 if table is None else last_seq(table), *(position(table, app) for app in positions)]


def _fitting(table: DeltaTable | None, rows: pa.Table, target: Target, *, view: str) -> DeltaTable:
    """The table, with a column for each of the rows'."""
    if table is None:
        return offline.create_table(target.uri, rows.schema, num_buckets=target.buckets)
    if not rows.num_rows:
        return table
    known = set(_table_schema(table).names)
    offline.check_schema(table, rows.schema, view=view)
    return table if known >= set(rows.schema.names) else DeltaTable(target.uri)


def _table_schema(table: DeltaTable) -> pa.Schema:
    schema = pa.schema(table.schema().to_arrow())
    return pa.schema([column for column in schema if column.name != offline.BUCKET])
