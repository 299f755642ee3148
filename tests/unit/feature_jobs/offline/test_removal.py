"""Removed rows are in no version and on no disk, and training sets that need them are marked as not reproducible."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from cluster.errors import ConfigError, TrainingSetError
from cluster.ledger.events import RowsRemoved, TrainingSetNotReproducible
from feature_jobs.retain import oldest_kept
from feature_jobs.store.offline import removal
from feature_jobs.store.offline.compaction import current_target, rewrite
from feature_jobs.store.offline.removal import RemovalReason, count_matching_rows, remove_rows
from tests.projects.features import PEOPLE, START, FeatureProject
from tests.projects.views import make_spec

OLD = pl.col("event_timestamp") < START + timedelta(hours=1)
"""Batch n of a project has the values of hour n. The tests remove those of hour 0."""
RETENTION = RemovalReason(cause="retention", older_than="2024-01-01T01:00:00+00:00")


def remove(project: FeatureProject, where: pl.Expr = OLD, reason: RemovalReason = RETENTION) -> int:
    return remove_rows(project.newest(), where, reason, project.ledger, view="income", actor="test")


def marked_training_sets(project: FeatureProject) -> list[int]:
    return [entry.payload["training_set"] for entry in project.ledger.entries(TrainingSetNotReproducible)]


def test_rows_are_removed_from_the_table_and_the_disk(project: FeatureProject) -> None:
    """This includes files of older versions, which compaction leaves."""
    for number in range(3):
        project.ingest(number)
    table = project.newest()
    rewrite(table, current_target(table), range(2))
    assert remove(project) == PEOPLE
    after = project.newest()
    assert after.rows == 2 * PEOPLE
    assert count_matching_rows(after, OLD) == {}
    frames = [
        pl.read_parquet(path, columns=["event_timestamp"]) for path in Path(project.uri).glob("*/*.parquet")
    ]
    assert pl.concat(frames)["event_timestamp"].min() == START + timedelta(hours=1)
    (event,) = project.ledger.entries(RowsRemoved)
    payload = event.payload
    assert (payload["rows_before"], payload["rows_after"], payload["files"]) == (3 * PEOPLE, 2 * PEOPLE, 2)
    assert (payload["table_version"], payload["older_than"]) == (after.version, RETENTION.older_than)


def test_only_training_sets_with_removed_rows_are_marked(project: FeatureProject) -> None:
    """Files without removed rows stay, so other training sets can still be rebuilt."""
    project.ingest(1)
    reproducible = project.build("kept")
    project.ingest(0)
    lost = project.build("lost")
    table = project.newest()
    rewrite(table, current_target(table), range(2))
    assert remove(project) == PEOPLE
    assert marked_training_sets(project) == [lost["seq"]]
    assert project.again("kept")["row_hash"] == reproducible["row_hash"]
    with pytest.raises(TrainingSetError, match=r"not reproducible since .*\(retention\)"):
        project.again("lost")
    assert remove(project) == 0
    assert len(marked_training_sets(project)) == len(list(project.ledger.entries(RowsRemoved))) == 1


def test_one_person_can_be_removed(project: FeatureProject) -> None:
    """The key's rows are removed from every batch. Other keys are not touched."""
    for number in range(2):
        project.ingest(number)
    assert remove(project, pl.col("person_id") == 3, RemovalReason(cause="erasure")) == 2
    rows = pl.concat([project.newest().read(bucket, ["amount"]) for bucket in range(2)])
    assert sorted(rows["person_id"].unique()) == [person for person in range(PEOPLE) if person != 3]


def test_column_that_a_file_lacks_is_null(project: FeatureProject) -> None:
    """A condition on null is not true, so no row is removed."""
    project.ingest(0)
    assert remove(project, pl.col("sector") == "x") == 0
    assert project.newest().rows == PEOPLE


def test_bucket_without_rows_has_no_file(project: FeatureProject) -> None:
    """No file without rows is written."""
    project.ingest(0)
    assert remove(project) == PEOPLE
    assert project.newest().files == ()
    project.ingest(1)
    assert project.newest().rows == PEOPLE


@pytest.mark.parametrize("step", ["_record_lost_training_sets", "_record_removals", "replace_files"])
def test_killed_anywhere_the_next_run_does_the_rest(
    project: FeatureProject, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """No event is missing, and no removed row stays on the disk."""
    for number in range(2):
        project.ingest(number)
    built = project.build()
    with monkeypatch.context() as patch:
        patch.setattr(removal, step, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove(project)
    make_old(project)
    remove(project)
    assert count_matching_rows(project.newest(), OLD) == {}
    assert (project.newest().rows, marked_training_sets(project)) == (PEOPLE, [built["seq"]])
    assert len(list(project.ledger.entries(RowsRemoved))) == 1


def test_new_file_without_a_commit_is_not_deleted(project: FeatureProject) -> None:
    """A job may still be writing it. It is deleted after a day, as it then belongs to a killed job."""
    project.ingest(1)
    project.write(0, "orphan")
    orphans = list(Path(project.uri).glob("*/orphan.parquet"))
    remove(project)
    assert all(path.exists() for path in orphans)
    make_old(project)
    remove(project)
    assert not any(path.exists() for path in orphans)
    assert project.newest().rows == PEOPLE


def test_retention_keeps_rows_of_exactly_that_age() -> None:
    """A view without retention is refused."""
    forever = make_spec("v", ["k"])
    assert oldest_kept(replace(forever, retention_s=3600), START) == START - timedelta(hours=1)
    with pytest.raises(ConfigError, match="has no retention"):
        oldest_kept(forever, START)


def make_old(project: FeatureProject) -> None:
    """Set the modification time of all files to two days ago."""
    then = time.time() - 2 * 86400
    for path in Path(project.uri).glob("*/*.parquet"):
        os.utime(path, (then, then))
