"""Files in a table's folders are found under any root, and a file that another job removes stops no job."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CommitConflict
from feature_jobs.store.offline import parts
from feature_jobs.store.offline.parts import MAX_AGE, bucket_files, modified_at, part_names, removed_after
from feature_jobs.store.offline.removal import count_matching_rows, remove_rows
from tests.projects.features import PEOPLE, START, FeatureProject
from tests.unit.feature_jobs.offline.test_removal import OLD, RETENTION

AGED = MAX_AGE.total_seconds() + 60


def write(uri: Path, name: str, *, age_s: float = 0) -> Path:
    path = uri / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    modified = path.stat().st_mtime - age_s
    os.utime(path, (modified, modified))
    return path


def test_a_root_may_contain_the_characters_of_patterns(tmp_path: Path) -> None:
    """Files of a table below `[a]?*` are found, and parts are removed."""
    table = tmp_path / "[a]?*" / "income"
    own = write(table, "bucket=3/a.parquet")
    write(table, "_delta_log/0.json")
    write(table, "other=1/b.parquet")
    assert bucket_files(str(table)) == ["bucket=3/a.parquet"]
    with part_names(str(table)) as name:
        part = write(table, f"bucket=0/{name}-0.parquet")
        assert bucket_files(str(table), name) == [f"bucket=0/{part.name}"]
    assert not part.exists()
    assert own.exists()


def test_retention_removes_rows_below_such_a_root(project: FeatureProject, tmp_path: Path) -> None:
    """The command used to end without an error and without a removal."""
    moved = tmp_path / "[live]"
    project.ingest(0)
    Path(project.root).rename(moved)
    project.uri = f"{moved}/features/income"
    table = project.newest()
    assert remove_rows(table, OLD, RETENTION, project.ledger, view="income", actor="test") == PEOPLE
    assert count_matching_rows(project.newest(), OLD) == {}


def test_a_part_that_another_job_removes_first_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs remove the same old parts at the same time. The job's own error is not hidden either."""
    old = write(tmp_path, "bucket=0/part-old.parquet", age_s=AGED)
    real = parts.bucket_files

    def vanishing(*arguments: Any) -> list[str]:
        found = real(*arguments)
        for path in found:
            (tmp_path / path).unlink()
        return found

    monkeypatch.setattr(parts, "bucket_files", vanishing)

    def run() -> None:
        with part_names(str(tmp_path)) as name:
            write(tmp_path, f"bucket=0/{name}-0.parquet")
            raise RuntimeError("the job's own error")

    with pytest.raises(RuntimeError, match="the job's own error"):
        run()
    assert not old.exists()


def test_only_old_parts_are_removed(tmp_path: Path) -> None:
    """A younger part may belong to a running job."""
    old = write(tmp_path, "bucket=0/part-old.parquet", age_s=AGED)
    young = write(tmp_path, "bucket=1/part-young.parquet", age_s=60)
    with part_names(str(tmp_path)):
        assert (old.exists(), young.exists()) == (False, True)


def test_a_file_that_is_gone_is_skipped_by_a_removal(
    project: FeatureProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that its job removes during `feature_jobs.retain` is not read."""
    project.ingest(0)
    table = project.newest()
    expected = count_matching_rows(table, OLD)
    monkeypatch.setattr(
        "feature_jobs.store.offline.removal.bucket_files",
        lambda uri: [*bucket_files(uri), "bucket=0/part-gone.parquet"],
    )
    assert count_matching_rows(table, OLD) == expected
    assert modified_at(f"{project.uri}/bucket=0/part-gone.parquet") is None


def test_files_of_a_job_are_removed_unless_a_version_has_them(project: FeatureProject) -> None:
    """So a commit that did succeed loses nothing."""
    project.ingest(0)
    project.write(1, "lost")
    before = bucket_files(project.uri, "batch0")

    def run(prefix: str) -> None:
        with removed_after(project.uri, prefix, CommitConflict):
            raise CommitConflict("at the same time")

    for prefix in ("lost", "batch0"):
        with pytest.raises(CommitConflict):
            run(prefix)
    assert before
    assert bucket_files(project.uri) == before
    assert project.newest().rows == PEOPLE


def test_times_of_files_have_a_zone(tmp_path: Path) -> None:
    """They are compared with the clock."""
    written = modified_at(str(write(tmp_path, "bucket=0/a.parquet")))
    assert written is not None
    assert written - START > timedelta(0)
    assert isinstance(written, datetime)
