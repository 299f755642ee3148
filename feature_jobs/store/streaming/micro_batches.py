"""Store small batches of a stream in a feature table, together with the stream's position.

The table's own commits contain the position (`txn` actions), so data and position always match. A stream that was
killed starts again at the table's position, and no row is lost or stored twice. Files without a commit stay on disk,
unused.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cluster.errors import CommitConflict, Inconsistent
from cluster.ledger.events import BatchIngested
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.ingestion.pushed_rows import POSITION
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import TIMESTAMP, Batch, Target, last_seq
from feature_jobs.store.online.rows import Horizon
from feature_jobs.store.types.schema import BUCKET, INGESTED, SEQ

PUSH_APP, PUSH_SEQ_APP = "falaj.push", "falaj.push.seq"
"""Application transactions: the number of the last push-log row in the table, and its `ingest_seq`."""

MAX_ROWS = 50_000
"""Default number of rows at which a batch of a stream is full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Validated rows of a stream with their `ingest_seq`."""

    ingest_id: str
    rows_in: int
    good: pa.Table
    bad: pa.Table
    """`reason`, `raw`, `ingest_seq`."""
    last_seq: int
    positions: Mapping[str, int]
    """Positions of the stream after this batch, by application id."""
    rows_late: int = 0


@dataclass(kw_only=True, slots=True)
class Tally:
    """Row counts of one run of a stream."""

    stored: int = 0
    quarantined: int = 0
    late: int = 0
    """Late rows, which are stored or quarantined depending on the policy."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Number of quarantined rows by reason."""

    def add(self, batch: Batch) -> None:
        """Add the counts of a committed batch."""
        self.stored += batch.rows_stored
        self.quarantined += batch.rows_quarantined
        self.late += batch.rows_late
        self.reasons.update(batch.reasons)


def table_horizon(table: DeltaTable) -> Horizon:
    """Return the horizon of a table version: which rows of the online store it has."""
    return Horizon(seq=last_seq(table), offset=position(table, PUSH_APP))


def position(table: DeltaTable | None, app: str) -> int:
    """Return a stream's position for an application id, -1 at the beginning."""
    number = None if table is None else table.transaction_version(app)
    return -1 if number is None else int(number)


def refresh(table: DeltaTable | None, uri: str) -> DeltaTable | None:
    """Return the newest version of a table, None if it does not exist. An open table reads only the new log entries."""
    if table is None:
        return offline.open_table(uri)
    table.update_incremental()
    return table


def store_batch(
    table: DeltaTable | None, rows: MicroBatch, target: Target, *, quarantine: QuarantineFiles
) -> tuple[Batch, DeltaTable]:
    """Write the files of a batch and commit them together with the position.

    Args:
        table: the version from which the position was read; None if there is no table yet.
        rows: the batch.
        target: the table.
        quarantine: quarantine of the table's view.

    Returns:
        What the commit records about the batch, and the table after the commit.

    Raises:
        CommitConflict: another job committed at the same time. Nothing was stored.
        SchemaMismatch: a column has another type than in the table.
        Inconsistent: the good and bad rows do not add up to `rows_in`. Nothing was stored.
    """
    if rows.good.num_rows + rows.bad.num_rows != rows.rows_in:
        raise Inconsistent(
            f"View '{quarantine.view}': {rows.rows_in} rows in are not {rows.good.num_rows} good + "
            f"{rows.bad.num_rows} bad. Nothing was committed."
        )
    now = pa.scalar(dt.datetime.now(dt.UTC), TIMESTAMP)
    good = rows.good.append_column(INGESTED, pa.repeat(now, rows.good.num_rows))
    before = _numbers(table, rows.positions)
    table = _with_columns_of(table, good, target, view=quarantine.view)
    if _numbers(table, rows.positions) != before:
        raise CommitConflict(
            f"Another job streamed into {target.uri} at the same time. Nothing was stored. Run it again."
        )
    name = f"{rows.ingest_id}-{uuid.uuid4().hex[:8]}"
    target = replace(target, buckets=offline.num_buckets(table))
    files = offline.write_files(good, target, name=name) if good.num_rows else []
    batch = Batch(
        ingest_id=rows.ingest_id,
        rows_in=rows.rows_in,
        rows_stored=good.num_rows,
        rows_quarantined=rows.bad.num_rows,
        reasons=dict(Counter(rows.bad["reason"].to_pylist())),
        quarantine=_write_bad(rows, now, quarantine),
        rows_late=rows.rows_late,
    )
    schema = good.schema if good.num_rows else _table_schema(table)
    offline.commit(table, schema, files, batch, seq=rows.last_seq, positions=rows.positions)
    return batch, DeltaTable(target.uri)


def batch_event(view: ViewSpec, source: str, batch: Batch, table_version: int) -> BatchIngested:
    """Return the ledger event of a batch that is in the table."""
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


def with_sequence(rows: pa.Table, first: int) -> pa.Table:
    """Replace the position of each row in its batch by its `ingest_seq`; `first` is the number of position 0."""
    numbers = pc.add(rows[POSITION], first)
    return rows.drop_columns([POSITION]).append_column(SEQ, numbers)


def _write_bad(rows: MicroBatch, now: pa.Scalar, quarantine: QuarantineFiles) -> str | None:
    """Write the bad rows of a batch to quarantine and return the file's name; None if there are no bad rows."""
    if not rows.bad.num_rows:
        return None
    quarantine.write(rows.ingest_id, rows.bad.append_column(INGESTED, pa.repeat(now, rows.bad.num_rows)))
    return f"{rows.ingest_id}.parquet"


def _numbers(table: DeltaTable | None, positions: Mapping[str, int]) -> list[int]:
    """Return the sequence number and the positions that a batch is based on."""
    return [-1 if table is None else last_seq(table), *(position(table, app) for app in positions)]


def _with_columns_of(table: DeltaTable | None, rows: pa.Table, target: Target, *, view: str) -> DeltaTable:
    """Return the table with all columns of the rows; create the table or add columns if needed."""
    if table is None:
        return offline.create_table(target.uri, rows.schema, num_buckets=target.buckets)
    if not rows.num_rows:
        return table
    known = set(_table_schema(table).names)
    offline.evolve_schema(table, rows.schema, view=view)
    return table if known >= set(rows.schema.names) else DeltaTable(target.uri)


def _table_schema(table: DeltaTable) -> pa.Schema:
    schema = pa.schema(table.schema().to_arrow())
    return pa.schema([column for column in schema if column.name != BUCKET])
