"""A feature table of several batches. Each batch corrects the amount of every person."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa

from cluster.security.keys.access import KeyAccess
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.offline.row_hash import row_hash
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.offline.training_set import build, join_in_process
from tests.projects.tables import TIME, commit_rows, feature_rows, pin, target_of
from tests.projects.views import make_spec, service_of

START = datetime(2024, 1, 1, tzinfo=UTC)
VIEW = make_spec("income", ["person_id"], amount="float64/personal")
ROWS = 40
"""Rows of a batch: one per person."""
PEOPLE = pa.table(
    {"person_id": range(ROWS), "event_timestamp": pa.array([START + timedelta(days=9)] * ROWS, TIME)}
)


def ingest(uri: str, access: KeyAccess, number: int, *, buckets: int = 2, view: ViewSpec = VIEW) -> None:
    """Ingest a batch that corrects the amount of every person."""
    first = number * ROWS
    amounts = [float(first + person) for person in range(ROWS)]
    times = [START + timedelta(hours=number)] * ROWS
    rows = feature_rows(times, first_seq=first, person_id=pa.array(range(ROWS)), amount=amounts)
    commit_rows(target_of(uri, view, access, buckets=buckets), rows, ingest_id=str(number))


def new_table(folder: Path, access: KeyAccess, *, batches: int) -> str:
    """Ingest batches into a new table below a folder, and return its URI."""
    uri = f"{folder}/features/income"
    for number in range(batches):
        ingest(uri, access, number)
    return uri


def pinned(uri: str, access: KeyAccess, version: int | None = None) -> Snapshot:
    """Return a snapshot of the table, by default of the newest version."""
    return pin(target_of(uri, VIEW, access), version=version)


def joined(table: Snapshot) -> str:
    """Return the row hash of the point-in-time join."""
    return row_hash(build(service_of(VIEW), {"income": table}, PEOPLE, join_parts=join_in_process))
