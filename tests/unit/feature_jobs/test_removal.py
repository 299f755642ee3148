"""Rows removed for good: not in any version, not on the disk, and whoever pinned them is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from cluster.errors import ConfigError, TrainingSetError
from cluster.ledger.events import RowsRemoved, TrainingSetNotReproducible
from cluster.security.keys.access import KeyAccess
from feature_jobs.retain import oldest_kept
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.offline import removal
from feature_jobs.store.offline.compaction import as_target, rewrite
from feature_jobs.store.offline.removal import Reason, holding, remove
from tests.feature_project import PEOPLE, START, FeatureProject

OLD = pl.col("event_timestamp") < START + timedelta(hours=1)
RETENTION = Reason(cause="retention", older_than="2024-01-01T01:00:00+00:00")


@pytest.fixture
def project(tmp_path: Path, access: KeyAccess) -> Iterator[FeatureProject]:
    """Values of every hour; the first hour's are to go."""
    project = FeatureProject(tmp_path / "root", access)
    yield project
    project.close()


def take_away(project: FeatureProject, where: pl.Expr = OLD, reason: Reason = RETENTION) -> int:
    return remove(project.newest(), where, reason, project.ledger, view="income", actor="test")


def marked(project: FeatureProject) -> list[int]:
    return [entry.payload["training_set"] for entry in project.ledger.entries(TrainingSetNotReproducible)]


def test_rows_are_gone_from_the_table_and_the_disk(project: FeatureProject) -> None:
    """Also from files that only older versions have, as compaction leaves them."""
    for number in range(3):
        project.ingest(number)
    table = project.newest()
    rewrite(table, as_target(table), range(2))
    assert take_away(project) == PEOPLE
    after = project.newest()
    assert after.rows == 2 * PEOPLE
    assert holding(after, OLD) == {}
    left = [
        pl.read_parquet(path, columns=["event_timestamp"]) for path in Path(project.uri).glob("*/*.parquet")
    ]
    assert pl.concat(left)["event_timestamp"].min() == START + timedelta(hours=1)
    (event,) = project.ledger.entries(RowsRemoved)
    said = event.payload
    assert (said["rows_before"], said["rows_after"], said["files"]) == (3 * PEOPLE, 2 * PEOPLE, 2)
    assert (said["table_version"], said["older_than"]) == (after.version, RETENTION.older_than)


def test_who_pinned_a_version_with_such_rows_is_marked_and_others_are_built_again(
    project: FeatureProject,
) -> None:
    """Files without such rows stay, whatever version they are of."""
    project.ingest(1)
    kept = project.build("kept")
    project.ingest(0)
    lost = project.build("lost")
    table = project.newest()
    rewrite(table, as_target(table), range(2))
    assert take_away(project) == PEOPLE
    assert marked(project) == [lost["seq"]]
    assert project.again("kept")["row_hash"] == kept["row_hash"]
    with pytest.raises(TrainingSetError, match=r"not reproducible since .*\(retention\)"):
        project.again("lost")
    assert take_away(project) == 0
    assert len(marked(project)) == len(list(project.ledger.entries(RowsRemoved))) == 1


def test_one_person_can_be_removed_by_the_same_way(project: FeatureProject) -> None:
    """By key, from every batch, and nobody else."""
    for number in range(2):
        project.ingest(number)
    assert take_away(project, pl.col("person_id") == 3, Reason(cause="erasure")) == 2
    read = pl.concat([project.newest().read(bucket, ["amount"]) for bucket in range(2)])
    assert sorted(read["person_id"].unique()) == [one for one in range(PEOPLE) if one != 3]


def test_a_column_that_a_file_lacks_is_null_there(project: FeatureProject) -> None:
    """And null is not true."""
    project.ingest(0)
    assert take_away(project, pl.col("sector") == "x") == 0
    assert project.newest().rows == PEOPLE


def test_a_bucket_of_which_nothing_is_left_is_empty(project: FeatureProject) -> None:
    """No file without rows takes its place."""
    project.ingest(0)
    assert take_away(project) == PEOPLE
    assert project.newest().files == ()
    project.ingest(1)
    assert project.newest().rows == PEOPLE


@pytest.mark.parametrize("step", ["_record_lost_training_sets", "_record_removals", "replace_files"])
def test_killed_anywhere_the_next_run_does_the_rest(
    project: FeatureProject, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Nothing stays unsaid, nothing stays on the disk."""
    for number in range(2):
        project.ingest(number)
    built = project.build()
    with monkeypatch.context() as patch:
        patch.setattr(removal, step, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            take_away(project)
    make_old(project)
    take_away(project)
    assert holding(project.newest(), OLD) == {}
    assert (project.newest().rows, marked(project)) == (PEOPLE, [built["seq"]])
    assert len(list(project.ledger.entries(RowsRemoved))) == 1


def test_a_file_that_is_being_written_is_left_alone(project: FeatureProject) -> None:
    """An orphan of a killed job, which nobody will ever commit, goes a day later."""
    project.ingest(1)
    project.write(0, "orphan")
    orphans = list(Path(project.uri).glob("*/orphan.parquet"))
    take_away(project)
    assert all(path.exists() for path in orphans)
    make_old(project)
    take_away(project)
    assert not any(path.exists() for path in orphans)
    assert project.newest().rows == PEOPLE


def test_retention_keeps_what_is_exactly_as_old() -> None:
    """And a view without one keeps everything."""
    view = ViewSpec(name="v", version="1", join_keys=["k"], fields=[], ttl_s=None, retention_s=3600)
    assert oldest_kept(view, START) == START - timedelta(hours=1)
    forever = ViewSpec(name="v", version="1", join_keys=["k"], fields=[], ttl_s=None)
    with pytest.raises(ConfigError, match="has no retention"):
        oldest_kept(forever, START)


def make_old(project: FeatureProject) -> None:
    """As if all files had been written two days ago."""
    then = time.time() - 2 * 86400
    for path in Path(project.uri).glob("*/*.parquet"):
        os.utime(path, (then, then))
