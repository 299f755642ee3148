"""Write feature tables without Ray."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

from cluster.security.keys.access import KeyAccess
from feature_jobs.store.catalog.protection import view_protection
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import Batch, Snapshot, Target

TIME = offline.TIMESTAMP
TIMES = [
    ("event_timestamp", TIME),
    ("created_timestamp", TIME),
    ("ingested_at", TIME),
    ("ingest_seq", pa.int64()),
]
"""The columns of every feature table besides keys and features."""


def feature_rows(
    event: list[datetime], *, created: list[datetime] | None = None, first_seq: int = 0, **columns: Any
) -> pa.Table:
    """Return rows in the form that ingestion stores. By default, a row's created time is its event time."""
    times = pa.array(event, TIME)
    ordering = {
        "event_timestamp": times,
        "created_timestamp": times if created is None else pa.array(created, TIME),
        "ingested_at": times,
        "ingest_seq": pa.array(range(first_seq, first_seq + len(event)), pa.int64()),
    }
    return pa.table(ordering | columns)


def target_of(uri: str, spec: ViewSpec, access: KeyAccess, *, buckets: int = 2) -> Target:
    """Return the target to which a view's rows are written."""
    return Target(
        uri=uri,
        keys=tuple(spec.join_keys),
        buckets=buckets,
        protection=view_protection(spec),
        access=access,
    )


def batch_of(ingest_id: str, stored: int, *, quarantined: int = 0) -> Batch:
    """Return the record of a batch that a commit stores."""
    return Batch(
        ingest_id=ingest_id,
        rows_in=stored + quarantined,
        rows_stored=stored,
        rows_quarantined=quarantined,
        reasons={},
        quarantine=None,
    )


def commit_rows(target: Target, rows: pa.Table, *, ingest_id: str = "a") -> int:
    """Create the table if it does not exist, store a batch of rows, and return the table's version."""
    offline.evolve_schema(
        offline.create_table(target.uri, rows.schema, num_buckets=target.buckets), rows.schema, view="income"
    )
    files = offline.write_files(rows, target, name=ingest_id)
    batch, seq = batch_of(ingest_id, rows.num_rows), max(rows["ingest_seq"].to_pylist())
    return offline.commit(DeltaTable(target.uri), rows.schema, files, batch, seq=seq)


def pin(target: Target, *, version: int | None = None) -> Snapshot:
    """Return a snapshot of the table, by default of the newest version."""
    return offline.snapshot(
        target.uri,
        view="income",
        keys=target.keys,
        protection=target.protection,
        access=target.access,
        version=version,
    )
