"""Training sets below the storage root: what was built, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import TrainingSetError
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess
from cluster.storage import Layout
from feature_jobs.store.catalog.protection import training_set_protection
from feature_jobs.store.catalog.specifications import service_spec
from feature_jobs.store.offline.row_hash import row_hash
from jobs.train.data import TrainingSet, read_training_set
from tests.broker import running_broker
from tests.feature_project import FeatureProject

KEYS = ("features/income/internal", "features/income/personal", "training_sets/credit/internal")


@pytest.fixture(scope="module")
def access() -> Iterator[KeyAccess]:
    with running_broker(*KEYS) as access:
        yield access


@pytest.fixture
def project(tmp_path: Path, access: KeyAccess) -> Iterator[FeatureProject]:
    """With a training set in its storage root, `kept.parquet`."""
    project = FeatureProject(tmp_path / "root", access)
    project.ingest(0)
    project.build("root/kept")
    yield project
    project.close()


def read(project: FeatureProject, path: Path | None = None) -> TrainingSet:
    return read_training_set(
        str(path or project.root / "kept.parquet"),
        protected_files(project.access),
        places=Layout(str(project.root)),
        ledger=project.ledger,
    )


def rewritten(project: FeatureProject, table: pa.Table, place: str | None) -> None:
    """Written by somebody with the keys."""
    spec = service_spec(project.ledger, "credit")
    path = str(project.root / "kept.parquet")
    protected_files(project.access).write(table, path, training_set_protection(spec), place=place)


def restate(project: FeatureProject, **changes: Any) -> None:
    path = project.root / "kept.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_built_is_read(project: FeatureProject) -> None:
    """With its hash, for the lineage."""
    source = read(project)
    assert row_hash(source.table) == source.hash == source.manifest["row_hash"]


def test_plain_parquet_in_its_place_is_refused(project: FeatureProject) -> None:
    """Who writes to the disk but has no keys teaches no model; not with a manifest of his own either."""
    table = read(project).table
    pq.write_table(table, project.root / "kept.parquet")
    with pytest.raises(TrainingSetError, match="signed by no key"):
        read(project)
    (project.root / "kept.manifest.json").unlink()
    with pytest.raises(TrainingSetError, match="without a manifest"):
        read(project)


def test_other_rows_are_refused_whatever_key_they_are_under(project: FeatureProject) -> None:
    """The ledger has their hash, and no manifest can say another."""
    table = read(project).table
    rewritten(project, table.slice(0, table.num_rows - 1), "kept.parquet")
    with pytest.raises(TrainingSetError, match="not those that were built"):
        read(project)
    restate(project, row_hash=row_hash(table.slice(0, table.num_rows - 1)), rows=table.num_rows - 1)
    with pytest.raises(TrainingSetError, match="ledger has no training set"):
        read(project)


def test_another_training_set_in_its_place_is_refused(project: FeatureProject) -> None:
    """With its manifest, also of the same service."""
    project.ingest(1)
    project.build("root/newer")
    for end in ("parquet", "manifest.json"):
        shutil.copy(project.root / f"newer.{end}", project.root / f"kept.{end}")
    with pytest.raises(TrainingSetError, match=r"belongs at 'newer\.parquet'"):
        read(project)


def test_one_of_an_earlier_release_is_read_by_its_rows(project: FeatureProject) -> None:
    """It says nothing of its place."""
    table = read(project).table
    rewritten(project, table, None)
    assert row_hash(read(project).table) == row_hash(table)


def test_outside_the_storage_root_a_file_is_its_owners(project: FeatureProject) -> None:
    """Without a manifest as it is; with one, it has to be what that describes."""
    project.build("taken")
    path = project.root.parent / "taken.parquet"
    table = read(project, path).table
    pq.write_table(table.take(list(reversed(range(table.num_rows)))), path)
    with pytest.raises(TrainingSetError, match="describes other rows"):
        read(project, path)
    (project.root.parent / "taken.manifest.json").unlink()
    assert read(project, path).table.num_rows == table.num_rows
