"""A batch that was stored wrongly, read from its source again: what differs is put right, everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess
from feature_jobs.materialize import rows as materialised
from feature_jobs.store import Field, FileSource
from feature_jobs.store.catalog.protection import quarantine_place, quarantine_protection, view_protection
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.ingestion.validation import prepare
from feature_jobs.store.offline import mending
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.mending import Place, mend
from feature_jobs.store.offline.point_in_time import answer
from feature_jobs.store.offline.removal import Reason, remove
from feature_jobs.store.offline.tables import Batch, Target
from tests.feature_project import INCOME, START, TIME, FeatureProject

Row = tuple[int | None, float, timedelta]
"""Person, amount, and when after the start."""
H = timedelta(hours=1)
NOW = START + timedelta(days=9)
RIGHT: list[Row] = [(1, 1.0, H), (2, 2.0, 2 * H), (3, 3.0, 3 * H), (4, 4.0, 4 * H)]


@pytest.fixture
def project(tmp_path: Path, access: KeyAccess) -> Iterator[FeatureProject]:
    project = FeatureProject(tmp_path / "root", access)
    yield project
    project.close()


def prepared(rows: Sequence[Row]) -> pa.Table:
    """Rows of a source, checked."""
    columns = {
        "person_id": pa.array([row[0] for row in rows], pa.int64()),
        "amount": pa.array([row[1] for row in rows]),
        "at": pa.array([START + row[2] for row in rows], TIME),
    }
    return prepare(pa.table(columns), INCOME, now=NOW)


def place(project: FeatureProject) -> Place:
    spec = view_spec(project.ledger, "income")
    target = Target(
        uri=project.uri,
        keys=("person_id",),
        buckets=2,
        protection=view_protection(spec),
        access=project.access,
    )
    return Place(
        pinned=project.newest(), target=target, quarantine=f"{project.root}/quarantine", view="income"
    )


def ingest(project: FeatureProject, batch: str, rows: Sequence[Row]) -> None:
    """As `feature_jobs.ingest` stores rows, without Ray."""
    times = dict.fromkeys(("event_timestamp", "created_timestamp", "ingested_at"), TIME)
    schema = pa.schema(
        [("person_id", pa.int64()), ("amount", pa.float64()), *times.items(), ("ingest_seq", pa.int64())]
    )
    offline.create_table(project.uri, schema, num_buckets=2)
    table, target = DeltaTable(project.uri), place(project).target
    first = offline.last_seq(table) + 1
    whole = prepared(rows).append_column("ingested_at", pa.array([NOW] * len(rows), TIME))
    frame = whole.append_column("ingest_seq", pa.array(range(first, first + len(rows)), pa.int64()))
    good = frame.filter(pa.array([row[0] is not None for row in rows]))
    bad = frame.filter(pa.array([row[0] is None for row in rows]))
    files = offline.write_files(good.select(schema.names), target, name=batch) if good.num_rows else []
    if bad.num_rows:
        kept = bad.select(["__reason", "__raw", "ingested_at", "ingest_seq"])
        kept = kept.rename_columns(["reason", "raw", "ingested_at", "ingest_seq"])
        protected_files(project.access).write(
            kept, f"{project.root}/quarantine/{batch}.parquet", quarantine_protection("income"),
            place=quarantine_place("income", batch),
        )  # fmt: skip
    said = Batch(
        ingest_id=batch,
        rows_in=len(rows),
        rows_stored=good.num_rows,
        rows_quarantined=bad.num_rows,
        reasons={},
        quarantine=None,
    )
    offline.commit(table, schema, files, said, seq=first + len(rows) - 1)


def again(project: FeatureProject, batch: str, rows: Sequence[Row]) -> BatchMended:
    return mend(place(project), prepared(rows), said(batch), project.ledger, actor="test")


def said(batch: str) -> BatchMended:
    """The event but for what is done."""
    return BatchMended(
        view="income", view_version="v", batch=batch, mend_id="m", source="x", source_digest="d"
    )


def everything(project: FeatureProject, *columns: str) -> pl.DataFrame:
    """The rows of the newest version by `ingest_seq`."""
    table = project.newest()
    frames = [table.read(bucket, columns) for bucket in range(table.num_buckets)]
    return pl.concat([one for one in frames if not one.is_empty()]).sort("ingest_seq")


def stored(project: FeatureProject) -> list[tuple[Any, ...]]:
    """Person, amount, hours and `ingest_seq` of each row of the newest version."""
    whole = everything(project, "amount")
    return [
        (person, amount, (at - START) / H, seq)
        for person, at, _, seq, amount in whole.iter_rows()
    ]  # fmt: skip


def known(project: FeatureProject, person: int, at: datetime) -> float | None:
    """What a training set says of a person at a moment."""
    features = everything(project, "amount")
    asked = pl.DataFrame(
        {"person_id": [person], "event_timestamp": [at]},
        schema_overrides=features.select("event_timestamp").schema,
    )
    found = answer(asked, features, keys=["person_id"], columns=["amount"], ttl=None)
    return found.columns["amount"][0]  # type: ignore[no-any-return]


def online(project: FeatureProject) -> dict[int | str, float]:
    """What a materialisation puts online."""
    found = materialised(view_spec(project.ledger, "income"), project.newest(), NOW)
    return {row.keys[0]: row.values[0] for row in found}


def test_wrong_row_is_replaced_under_its_own_number(project: FeatureProject) -> None:
    """Equal rows stay where they are, a wrong time is gone from training sets and from the online store."""
    ingest(project, "a", [(1, 1.0, H), (2, 2.0, timedelta(0)), (3, 33.0, 3 * H), (4, 4.0, 4 * H)])
    files = {file.path for file in project.newest().files}
    event = again(project, "a", RIGHT)
    assert stored(project) == [(n, float(n), n, n - 1) for n in (1, 2, 3, 4)]
    counts = (event.rows_in, event.rows_kept, event.rows_changed, event.rows_added, event.rows_removed)
    assert counts == (4, 2, 2, 0, 0)
    assert known(project, 2, START + H) is None
    assert known(project, 2, START + 2 * H) == 2.0
    assert online(project) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert event.table_version == project.newest().version
    (entry,) = project.ledger.entries(BatchMended)
    assert entry.payload["rows_changed"] == 2
    assert all(Path(f"{project.uri}/{path}").exists() for path in files)  # pinned versions are as they were


def test_mended_row_does_not_beat_a_later_correction(project: FeatureProject) -> None:
    """A correction of equal times came after the batch, and stays on top of its mended row."""
    ingest(project, "a", [(1, 11.0, H)])
    ingest(project, "b", [(1, 5.0, H)])
    again(project, "a", [(1, 1.0, H)])
    assert stored(project) == [(1, 1.0, 1, 0), (1, 5.0, 1, 1)]
    assert known(project, 1, NOW) == 5.0
    assert online(project) == {1: 5.0}


def test_new_column_and_tombstones_are_mended_too(project: FeatureProject) -> None:
    """What a stored row lacks is null there, and no deletion."""
    ingest(project, "a", RIGHT[:2])
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
    event = mend(place(project), rows, said("a"), project.ledger, actor="test")
    assert (event.rows_kept, event.rows_changed) == (1, 1)
    found = everything(project, "amount", "sector")
    assert found.select("amount", "sector", "deleted").rows() == [(1.0, None, False), (None, None, True)]


def test_second_time_changes_nothing(project: FeatureProject) -> None:
    """No row is stored twice, and no version of the table is made."""
    ingest(project, "a", RIGHT)
    before = project.newest().version
    event = again(project, "a", RIGHT)
    assert (event.rows_kept, event.table_version, project.newest().version) == (4, None, before)
    assert len(stored(project)) == 4


def test_row_that_is_bad_now_goes_to_quarantine_and_a_good_one_comes_out(project: FeatureProject) -> None:
    """Between table and quarantine each row is in one place, under the number that it always had."""
    ingest(project, "a", [(1, 1.0, H), (None, 2.0, H), (3, 3.0, -200 * 365 * 24 * H)])
    event = again(project, "a", [(1, 1.0, H), (2, 2.0, H), (3, 3.0, 8000 * 24 * H)])
    assert [row[0] for row in stored(project)] == [1, 2]
    assert (event.rows_added, event.rows_removed, event.rows_quarantined) == (1, 1, 1)
    path = f"{project.root}/quarantine/a.parquet"
    kept = protected_files(project.access).read(path)
    assert kept["ingest_seq"].to_pylist() == [2]
    assert list(event.reasons) == ["event_timestamp lies in the future"]


def test_removed_row_does_not_come_back(project: FeatureProject) -> None:
    """What retention took away is neither in the table nor in quarantine, and is left out."""
    ingest(project, "a", [(1, 1.0, H), (2, 22.0, 2 * H)])
    where = pl.col("event_timestamp") < START + 2 * H
    remove(project.newest(), where, Reason(cause="retention"), project.ledger, view="income", actor="test")
    event = again(project, "a", [(1, 1.0, H), (2, 2.0, 2 * H)])
    assert stored(project) == [(2, 2.0, 2, 1)]
    assert (event.rows_in, event.rows_kept, event.rows_changed) == (2, 0, 1)


def test_killed_mending_is_finished(project: FeatureProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed behind the commit: the next run tells the ledger, once, and clears the quarantine."""
    ingest(project, "a", [(None, 1.0, H), (2, 22.0, 2 * H)])
    rows: list[Row] = [(1, 1.0, H), (2, 2.0, 2 * H)]
    with monkeypatch.context() as killed:
        killed.setattr(mending, "_rewrite", _killed_behind(mending._rewrite))
        with pytest.raises(KeyboardInterrupt):
            again(project, "a", rows)
    assert list(project.ledger.entries(BatchMended)) == []
    again(project, "a", rows)
    assert stored(project) == [(1, 1.0, 1, 0), (2, 2.0, 2, 1)]
    changed = [entry.payload["rows_changed"] for entry in project.ledger.entries(BatchMended)]
    assert changed == [1, 0]
    assert not Path(f"{project.root}/quarantine/a.parquet").exists()


def test_batch_of_other_rows_is_refused(project: FeatureProject) -> None:
    """Rows are told apart by their place in the source, so their number must be the same."""
    ingest(project, "a", RIGHT)
    for batch in ("a", "b"):
        with pytest.raises(SourceError, match="cannot be mended"):
            again(project, batch, RIGHT[:2])


def _killed_behind(work: Any) -> Any:
    def killed(*arguments: Any) -> None:
        work(*arguments)
        raise KeyboardInterrupt

    return killed
