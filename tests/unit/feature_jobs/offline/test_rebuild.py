"""A rebuild from a manifest gives the same rows, whatever happened to the tables since, or is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import Inconsistent, TrainingSetError
from cluster.ledger.events import TrainingSetBuilt, TrainingSetNotReproducible
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from feature_jobs.store import Field
from feature_jobs.store.offline.compaction import current_target, rewrite
from feature_jobs.training_set import TrainingSetConfig
from tests.projects.features import INCOME, PEOPLE, START, FeatureProject
from tests.projects.tables import TIME


@pytest.fixture
def project(project: FeatureProject) -> FeatureProject:
    """A project with three batches."""
    for number in range(3):
        project.ingest(number)
    return project


def test_rebuild_gives_the_same_rows_after_all_kinds_of_changes(project: FeatureProject) -> None:
    """The changes are: corrections, compaction, key rotation and a new definition. The newest state has other rows."""
    first = project.build()
    project.ingest(3)
    for name in ("internal", "personal"):
        key_store(project.access).rotate(f"features/income/{name}")
    protected_files(project.access).forget()
    table = project.newest()
    rewrite(table, current_target(table), range(2))
    project.apply(replace(INCOME, schema=[*INCOME.schema, Field("sector", "string")]))
    rebuilt = project.again()
    assert (rebuilt["row_hash"], rebuilt["table_versions"]) == (first["row_hash"], first["table_versions"])
    original, again = (pq.read_table(project.root.parent / f"{name}.parquet") for name in ("train", "again"))
    assert original.equals(again)
    assert project.build("new")["row_hash"] != first["row_hash"]
    built = [entry.payload for entry in project.ledger.entries(TrainingSetBuilt)]
    assert [payload["rebuilt_from"] for payload in built] == [None, first["seq"], None]


def test_earlier_table_version_gives_the_same_rows_as_then(project: FeatureProject) -> None:
    """Rows that were ingested since do not count. An unknown version or view is refused by name."""
    then = project.build()
    project.ingest(3)
    travelled = project.build("then", versions=then["table_versions"])
    assert (travelled["row_hash"], travelled["table_versions"]) == (then["row_hash"], then["table_versions"])
    with pytest.raises(TrainingSetError, match="no table version 99; the newest is"):
        project.build("never", versions={"income": 99})
    with pytest.raises(TrainingSetError, match="no view 'incme'"):
        project.build("never", versions={"incme": 1})


def test_rebuild_uses_the_cutoff_of_the_manifest(project: FeatureProject) -> None:
    """The command line does not change it."""
    late = pa.array([START + timedelta(days=20)] * PEOPLE, TIME)
    project.ingest(3, created_timestamp=late)
    first = project.build(cutoff=False)
    assert (first["cutoff"], first["row_hash"]) == (False, project.again(cutoff=True)["row_hash"])
    assert project.build("other")["row_hash"] != first["row_hash"]


def test_manifest_has_the_share_of_rows_hidden_by_the_cutoff(project: FeatureProject) -> None:
    """It is the share of entity rows whose value exists, but was created only later."""
    project.write_entities(PEOPLE)
    table = pq.read_table(project.root / "people.parquet")
    early = pa.array([START - timedelta(hours=1)] * PEOPLE, TIME)
    pq.write_table(table.set_column(1, "event_timestamp", early), project.root / "people.parquet")
    assert project.build()["hidden_share"] == {"income": 0.0}
    project.ingest(3, event_timestamp=early)
    assert project.build()["hidden_share"] == {"income": 1.0}


def test_rebuild_with_other_entity_rows_is_refused(project: FeatureProject) -> None:
    """They are compared before the join."""
    project.build()
    project.write_entities(PEOPLE - 1)
    with pytest.raises(TrainingSetError, match="are not those of"):
        project.again()


def test_altered_missing_or_invalid_manifest_is_refused(project: FeatureProject) -> None:
    """A manifest is compared with the ledger's event."""
    project.build()
    content = json.loads(project.manifest().read_text())
    for changes, words in (
        ({"table_versions": {"income": 1}}, "has no training set"),
        ({"cutoff": False}, "has no training set"),
        ({"seq": 1}, "has no training set"),
        ({"row_hash": None, "seq": "x"}, "is not the manifest"),
    ):
        project.manifest().write_text(json.dumps(content | changes))
        with pytest.raises(TrainingSetError, match=words):
            project.again()
    project.manifest().unlink()
    with pytest.raises(TrainingSetError, match="No manifest"):
        project.again()


def test_manifest_of_an_older_release_can_be_rebuilt(project: FeatureProject) -> None:
    """It has no path of its entity rows, and its cutoff was always on."""
    first = project.build()
    content = json.loads(project.manifest().read_text())
    for name in ("entities", "cutoff", "hidden_share"):
        del content[name]
    project.manifest().write_text(json.dumps(content))
    with pytest.raises(TrainingSetError, match="does not contain the path"):
        project.again()
    assert project.again(entities=f"{project.root}/people.parquet")["row_hash"] == first["row_hash"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "manifest="),
        ({"service": "credit", "manifest": "x.manifest.json"}, "manifest="),
        ({"service": "credit"}, "entities="),
    ],
)
def test_missing_arguments_are_refused_by_name(arguments: dict[str, str], words: str) -> None:
    """The command needs a service with entity rows, or a manifest."""
    with pytest.raises(ValueError, match=words):
        TrainingSetConfig(output="o.parquet", **arguments)


def test_rebuild_of_an_irreproducible_training_set_is_refused(project: FeatureProject) -> None:
    """The message says since when and why."""
    first = project.build()
    event = TrainingSetNotReproducible(
        training_set=first["seq"],
        service="credit",
        row_hash=first["row_hash"],
        view="income",
        table_version=3,
        cause="retention",
    )
    project.ledger.append(event, actor="test")
    with pytest.raises(TrainingSetError, match=r"not reproducible since \d{4}-.* \(retention\)"):
        project.again()


def test_missing_files_are_refused_and_other_rows_are_an_inconsistency(
    project: FeatureProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may be removed on purpose. Other rows from the same inputs are an error of the platform."""
    first = project.build()
    with monkeypatch.context() as patch:
        entities_hash = first["entities_hash"]
        patch.setattr(
            "feature_jobs.training_set.has_row_hash", lambda table, expected: expected == entities_hash
        )
        with pytest.raises(Inconsistent, match="Built again"):
            project.again()
    assert not (project.root.parent / "again.parquet").exists()
    next(Path(project.uri).glob("*/*.parquet")).unlink()
    with pytest.raises(TrainingSetError, match="were removed"):
        project.again()
