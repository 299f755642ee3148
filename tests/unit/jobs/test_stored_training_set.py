"""Training sets below the storage root: only unchanged ones are read."""

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
from tests.projects.features import FeatureProject
from tests.servers.key_broker import running_broker

KEYS = ("features/income/internal", "features/income/personal", "training_sets/credit/internal")


@pytest.fixture(scope="module")
def access() -> Iterator[KeyAccess]:
    with running_broker(*KEYS) as access:
        yield access


@pytest.fixture
def project(tmp_path: Path, access: KeyAccess) -> Iterator[FeatureProject]:
    """A project with the training set `stored.parquet` in its storage root."""
    project = FeatureProject(tmp_path / "root", access)
    project.ingest(0)
    project.build("root/stored")
    yield project
    project.close()


def read(project: FeatureProject, path: Path | None = None) -> TrainingSet:
    return read_training_set(
        str(path or project.root / "stored.parquet"),
        protected_files(project.access),
        places=Layout(str(project.root)),
        ledger=project.ledger,
    )


def rewrite(project: FeatureProject, table: pa.Table, place: str | None) -> None:
    """Replace the rows of the training set, with the right keys. `place` is the path that the file is bound to."""
    spec = service_spec(project.ledger, "credit")
    path = str(project.root / "stored.parquet")
    protected_files(project.access).write(table, path, training_set_protection(spec), place=place)


def change_manifest(project: FeatureProject, **changes: Any) -> None:
    path = project.root / "stored.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_training_set_that_was_built_is_read(project: FeatureProject) -> None:
    """Its hash is the manifest's row hash."""
    source = read(project)
    assert row_hash(source.table) == source.hash == source.manifest["row_hash"]


def test_an_unencrypted_file_is_refused(project: FeatureProject) -> None:
    """Write access to the disk without keys is not enough to change what a model learns, even without a manifest."""
    table = read(project).table
    pq.write_table(table, project.root / "stored.parquet")
    with pytest.raises(TrainingSetError, match="signed by no key"):
        read(project)
    (project.root / "stored.manifest.json").unlink()
    with pytest.raises(TrainingSetError, match="without a manifest"):
        read(project)


def test_changed_rows_are_refused_even_with_the_right_keys(project: FeatureProject) -> None:
    """The ledger has the hash of the rows. A manifest with another hash is refused, too."""
    table = read(project).table
    rewrite(project, table.slice(0, table.num_rows - 1), "stored.parquet")
    with pytest.raises(TrainingSetError, match="not those that were built"):
        read(project)
    change_manifest(project, row_hash=row_hash(table.slice(0, table.num_rows - 1)), rows=table.num_rows - 1)
    with pytest.raises(TrainingSetError, match="ledger has no training set"):
        read(project)


def test_a_training_set_moved_to_another_path_is_refused(project: FeatureProject) -> None:
    """It is refused even if its manifest was moved too, and if a training set of the same service was at that path."""
    project.ingest(1)
    project.build("root/newer")
    for end in ("parquet", "manifest.json"):
        shutil.copy(project.root / f"newer.{end}", project.root / f"stored.{end}")
    with pytest.raises(TrainingSetError, match=r"belongs at 'newer\.parquet'"):
        read(project)


def test_a_file_of_an_older_release_without_a_path_is_read(project: FeatureProject) -> None:
    """Such a file is not bound to a path; its rows are still compared with the ledger."""
    table = read(project).table
    rewrite(project, table, None)
    assert row_hash(read(project).table) == row_hash(table)


def test_a_file_outside_the_storage_root_is_only_compared_with_its_manifest(project: FeatureProject) -> None:
    """Without a manifest it is read as it is; with a manifest its rows must match."""
    project.build("taken")
    path = project.root.parent / "taken.parquet"
    table = read(project, path).table
    pq.write_table(table.take(list(reversed(range(table.num_rows)))), path)
    with pytest.raises(TrainingSetError, match="does not describe the rows"):
        read(project, path)
    (project.root.parent / "taken.manifest.json").unlink()
    assert read(project, path).table.num_rows == table.num_rows
