"""Mending reads the source of a stored batch again, and corrects the rows that differ in all places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from cluster.errors import SourceError
from cluster.ledger.events import BatchMended
from feature_jobs.materialize import newest_rows as materialised
from feature_jobs.store import Field, FileSource
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.validation import prepare
from feature_jobs.store.offline import mending
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.mending import BatchLocation, mend
from feature_jobs.store.offline.removal import RemovalReason, remove_rows
from tests.projects.features import INCOME, START, FeatureProject
from tests.projects.tables import TIME, TIMES, batch_of
from tests.samples.frame_join import join_features

Row = tuple[int | None, float, timedelta]
"""Person, amount, and time after the start."""
H = timedelta(hours=1)
NOW = START + timedelta(days=9)
CORRECT: list[Row] = [(1, 1.0, H), (2, 2.0, 2 * H), (3, 3.0, 3 * H), (4, 4.0, 4 * H)]


def prepared(rows: Sequence[Row]) -> pa.Table:
    """Return checked rows of a source."""
    columns = {
        "person_id": pa.array([row[0] for row in rows], pa.int64()),
        "amount": pa.array([row[1] for row in rows]),
        "at": pa.array([START + row[2] for row in rows], TIME),
    }
    return prepare(pa.table(columns), INCOME, now=NOW)


def mending_place(project: FeatureProject) -> BatchLocation:
    return BatchLocation(pinned=project.newest(), target=project.target(), quarantine=quarantine(project))


def ingest(project: FeatureProject, batch: str, rows: Sequence[Row]) -> None:
    """Store a batch like `feature_jobs.ingest`. Rows without a person go to quarantine."""
    schema = pa.schema([("person_id", pa.int64()), ("amount", pa.float64()), *TIMES])
    offline.create_table(project.uri, schema, num_buckets=2)
    table, target = DeltaTable(project.uri), project.target()
    first = offline.last_seq(table) + 1
    checked = prepared(rows).append_column("ingested_at", pa.array([NOW] * len(rows), TIME))
    frame = checked.append_column("ingest_seq", pa.array(range(first, first + len(rows)), pa.int64()))
    good = frame.filter(pa.array([row[0] is not None for row in rows]))
    bad = frame.filter(pa.array([row[0] is None for row in rows]))
    files = offline.write_files(good.select(schema.names), target, name=batch) if good.num_rows else []
    if bad.num_rows:
        rows_aside = bad.select(["__reason", "__raw", "ingested_at", "ingest_seq"])
        rows_aside = rows_aside.rename_columns(["reason", "raw", "ingested_at", "ingest_seq"])
        quarantine(project).write(batch, rows_aside)
    record = batch_of(batch, good.num_rows, quarantined=bad.num_rows)
    offline.commit(table, schema, files, record, seq=first + len(rows) - 1)


def quarantine(project: FeatureProject) -> QuarantineFiles:
    return QuarantineFiles(folder=f"{project.root}/quarantine", view="income", access=project.access)


def mend_batch(project: FeatureProject, batch: str, rows: Sequence[Row]) -> BatchMended:
    return mend(mending_place(project), prepared(rows), event_template(batch), project.ledger, actor="test")


def event_template(batch: str) -> BatchMended:
    """Return an event without the counts of rows."""
    return BatchMended(
        view="income", view_version="v", batch=batch, mend_id="m", source="x", source_digest="d"
    )


def newest_rows(project: FeatureProject, *columns: str) -> pl.DataFrame:
    """Return the rows of the table's newest version, sorted by `ingest_seq`."""
    table = project.newest()
    frames = [table.read(bucket, columns) for bucket in range(table.num_buckets)]
    return pl.concat([frame for frame in frames if not frame.is_empty()]).sort("ingest_seq")


def stored(project: FeatureProject) -> list[tuple[Any, ...]]:
    """Return person, amount, hours and `ingest_seq` of each row of the newest version."""
    frame = newest_rows(project, "amount")
    return [(person, amount, (at - START) / H, seq) for person, at, _, seq, amount in frame.iter_rows()]


def training_value(project: FeatureProject, person: int, at: datetime) -> float | None:
    """Return a person's amount in a training set with an entity row at a moment."""
    features = newest_rows(project, "amount")
    entity_rows = pl.DataFrame(
        {"person_id": [person], "event_timestamp": [at]},
        schema_overrides=features.select("event_timestamp").schema,
    )
    answered = join_features(entity_rows, features, keys=["person_id"], columns=["amount"], ttl=None)
    return answered.columns["amount"][0]  # type: ignore[no-any-return]


def online(project: FeatureProject) -> dict[int | str, float]:
    """Return the amounts that a materialisation puts online, by person."""
    rows = materialised(view_spec(project.ledger, "income"), project.newest(), NOW)
    return {row.keys[0]: row.values[0] for row in rows}


def test_wrong_row_is_replaced_and_keeps_its_ingest_seq(project: FeatureProject) -> None:
    """Equal rows are not touched. A wrong time is removed from training sets and from the online store."""
    ingest(project, "a", [(1, 1.0, H), (2, 2.0, timedelta(0)), (3, 33.0, 3 * H), (4, 4.0, 4 * H)])
    files = {file.path for file in project.newest().files}
    event = mend_batch(project, "a", CORRECT)
    assert stored(project) == [(n, float(n), n, n - 1) for n in (1, 2, 3, 4)]
    counts = (event.rows_in, event.rows_kept, event.rows_changed, event.rows_added, event.rows_removed)
    assert counts == (4, 2, 2, 0, 0)
    assert training_value(project, 2, START + H) is None
    assert training_value(project, 2, START + 2 * H) == 2.0
    assert online(project) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert event.table_version == project.newest().version
    (entry,) = project.ledger.entries(BatchMended)
    assert entry.payload["rows_changed"] == 2
    assert all(Path(f"{project.uri}/{path}").exists() for path in files)  # pinned versions can still be read


def test_mended_row_does_not_replace_a_later_correction(project: FeatureProject) -> None:
    """A correction with equal times was ingested after the batch, and still replaces its row."""
    ingest(project, "a", [(1, 11.0, H)])
    ingest(project, "b", [(1, 5.0, H)])
    mend_batch(project, "a", [(1, 1.0, H)])
    assert stored(project) == [(1, 1.0, 1, 0), (1, 5.0, 1, 1)]
    assert training_value(project, 1, NOW) == 5.0
    assert online(project) == {1: 5.0}


def test_new_column_and_tombstones_are_mended(project: FeatureProject) -> None:
    """A column that a stored row lacks is null, and such a row is not a tombstone."""
    ingest(project, "a", CORRECT[:2])
    source = FileSource("x.parquet", event_timestamp="at", deleted="gone")
    wider = replace(INCOME, source=source, schema=[*INCOME.schema, Field("sector", "string")])
    block = {
        "person_id": [1, 2],
        "amount": [1.0, 2.0],
        "sector": [None, "farm"],
        "gone": [False, True],
        "at": pa.array([START + H, START + 2 * H], TIME),
    }
    rows = prepare(pa.table(block), wider, now=NOW)
    event = mend(mending_place(project), rows, event_template("a"), project.ledger, actor="test")
    assert (event.rows_kept, event.rows_changed) == (1, 1)
    stored_rows = newest_rows(project, "amount", "sector").select("amount", "sector", "deleted").rows()
    assert stored_rows == [(1.0, None, False), (None, None, True)]


def test_mending_a_correct_batch_changes_nothing(project: FeatureProject) -> None:
    """No row is stored twice, and the table gets no new version."""
    ingest(project, "a", CORRECT)
    before = project.newest().version
    event = mend_batch(project, "a", CORRECT)
    assert (event.rows_kept, event.table_version, project.newest().version) == (4, None, before)
    assert len(stored(project)) == 4


def test_rows_move_between_table_and_quarantine(project: FeatureProject) -> None:
    """A row that is bad now moves to quarantine, and a good one moves to the table. Both keep their `ingest_seq`."""
    ingest(project, "a", [(1, 1.0, H), (None, 2.0, H), (3, 3.0, -200 * 365 * 24 * H)])
    event = mend_batch(project, "a", [(1, 1.0, H), (2, 2.0, H), (3, 3.0, 8000 * 24 * H)])
    assert [row[0] for row in stored(project)] == [1, 2]
    assert (event.rows_added, event.rows_removed, event.rows_quarantined) == (1, 1, 1)
    assert quarantine(project).read("a")["ingest_seq"].to_pylist() == [2]
    assert list(event.reasons) == ["event_timestamp lies in the future"]


def test_mending_does_not_restore_removed_rows(project: FeatureProject) -> None:
    """A row that retention removed is neither in the table nor in quarantine, and is skipped."""
    ingest(project, "a", [(1, 1.0, H), (2, 22.0, 2 * H)])
    where = pl.col("event_timestamp") < START + 2 * H
    remove_rows(
        project.newest(), where, RemovalReason(cause="retention"), project.ledger, view="income", actor="test"
    )
    event = mend_batch(project, "a", [(1, 1.0, H), (2, 2.0, 2 * H)])
    assert stored(project) == [(2, 2.0, 2, 1)]
    assert (event.rows_in, event.rows_kept, event.rows_changed) == (2, 0, 1)


def killed_after(function: Any) -> Any:
    def killed(*arguments: Any) -> None:
        function(*arguments)
        raise KeyboardInterrupt

    return killed


def test_next_run_finishes_a_killed_mending(project: FeatureProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was killed after its commit. The next run appends the event once, and removes the quarantine file."""
    ingest(project, "a", [(None, 1.0, H), (2, 22.0, 2 * H)])
    rows: list[Row] = [(1, 1.0, H), (2, 2.0, 2 * H)]
    with monkeypatch.context() as killed:
        killed.setattr(mending, "_rewrite", killed_after(mending._rewrite))
        with pytest.raises(KeyboardInterrupt):
            mend_batch(project, "a", rows)
    assert list(project.ledger.entries(BatchMended)) == []
    mend_batch(project, "a", rows)
    assert stored(project) == [(1, 1.0, 1, 0), (2, 2.0, 2, 1)]
    changed = [entry.payload["rows_changed"] for entry in project.ledger.entries(BatchMended)]
    assert changed == [1, 0]
    assert quarantine(project).batches() == []


def test_source_with_another_number_of_rows_is_refused(project: FeatureProject) -> None:
    """Rows are identified by their position in the source, so their number must be the same."""
    ingest(project, "a", CORRECT)
    for batch in ("a", "b"):
        with pytest.raises(SourceError, match="cannot be mended"):
            mend_batch(project, batch, CORRECT[:2])
