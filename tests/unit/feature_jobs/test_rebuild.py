"""A training set built again from its manifest: the same rows, whatever happened to the tables since, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import Inconsistent, TrainingSetError
from cluster.ledger.events import TrainingSetBuilt, TrainingSetNotReproducible
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess, key_store
from feature_jobs.store import FeatureView, Field
from feature_jobs.store.offline.compaction import as_target, rewrite
from feature_jobs.training_set import TrainingSetConfig
from tests.feature_project import INCOME, PEOPLE, START, TIME, FeatureProject


@pytest.fixture
def project(tmp_path: Path, access: KeyAccess) -> Iterator[FeatureProject]:
    project = FeatureProject(tmp_path / "root", access)
    for number in range(3):
        project.ingest(number)
    yield project
    project.close()


def test_the_same_rows_after_corrections_compaction_rotation_and_a_new_definition(
    project: FeatureProject,
) -> None:
    """Everything is pinned; the newest state has other rows."""
    first = project.build()
    project.ingest(3)
    for name in ("internal", "personal"):
        key_store(project.access).rotate(f"features/income/{name}")
    protected_files(project.access).forget()
    table = project.newest()
    rewrite(table, as_target(table), range(2))
    project.apply(
        FeatureView(
            "income",
            entities=INCOME.entities,
            source=INCOME.source,
            schema=[*INCOME.schema, Field("sector", "string")],
        )
    )
    again = project.again()
    assert (again["row_hash"], again["table_versions"]) == (first["row_hash"], first["table_versions"])
    read = [pq.read_table(project.root.parent / f"{name}.parquet") for name in ("train", "again")]
    assert read[0].equals(read[1])
    assert project.build("new")["row_hash"] != first["row_hash"]
    built = [entry.payload for entry in project.ledger.entries(TrainingSetBuilt)]
    assert [payload["rebuilt_from"] for payload in built] == [None, first["seq"], None]


def test_an_earlier_version_of_a_table_gives_what_it_gave_then(project: FeatureProject) -> None:
    """Whatever was ingested since; a version or view that is not there is refused by name."""
    then = project.build()
    project.ingest(3)
    travelled = project.build("then", versions=then["table_versions"])
    assert (travelled["row_hash"], travelled["table_versions"]) == (then["row_hash"], then["table_versions"])
    with pytest.raises(TrainingSetError, match="no table version 99; the newest is"):
        project.build("never", versions={"income": 99})
    with pytest.raises(TrainingSetError, match="no view 'incme'"):
        project.build("never", versions={"incme": 1})


def test_the_switch_is_pinned_too(project: FeatureProject) -> None:
    """Whatever the command line says."""
    late = pa.array([START + timedelta(days=20)] * PEOPLE, TIME)
    project.ingest(3, created_timestamp=late)
    first = project.build(cutoff=False)
    assert (first["cutoff"], first["row_hash"]) == (False, project.again(cutoff=True)["row_hash"])
    assert project.build("other")["row_hash"] != first["row_hash"]


def test_share_that_the_cutoff_leaves_without_values_is_in_the_manifest(project: FeatureProject) -> None:
    """Of all entity rows, those for whom nothing was known yet."""
    project.write_entities(PEOPLE)
    table = pq.read_table(project.root / "people.parquet")
    early = pa.array([START - timedelta(hours=1)] * PEOPLE, TIME)
    pq.write_table(table.set_column(1, "event_timestamp", early), project.root / "people.parquet")
    assert project.build()["hidden_share"] == {"income": 0.0}
    project.ingest(3, event_timestamp=early)
    assert project.build()["hidden_share"] == {"income": 1.0}


def test_other_entity_rows_are_refused(project: FeatureProject) -> None:
    """Before anything is joined."""
    project.build()
    project.write_entities(PEOPLE - 1)
    with pytest.raises(TrainingSetError, match="are not those of"):
        project.again()


def test_manifest_that_was_altered_or_is_none_is_refused(project: FeatureProject) -> None:
    """The ledger knows what was built."""
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


def test_manifest_of_an_older_release_is_built_again(project: FeatureProject) -> None:
    """It does not name its entity rows, and the cutoff was always on."""
    first = project.build()
    content = json.loads(project.manifest().read_text())
    for name in ("entities", "cutoff", "hidden_share"):
        del content[name]
    project.manifest().write_text(json.dumps(content))
    with pytest.raises(TrainingSetError, match="does not say where"):
        project.again()
    assert project.again(entities=f"{project.root}/people.parquet")["row_hash"] == first["row_hash"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "manifest="),
        ({"service": "credit", "manifest": "x.manifest.json"}, "manifest="),
        ({"service": "credit"}, "entities="),
    ],
)
def test_command_says_what_it_needs(given: dict[str, str], words: str) -> None:
    """A service with entity rows, or a manifest."""
    with pytest.raises(ValueError, match=words):
        TrainingSetConfig(output="o.parquet", **given)


def test_marked_not_reproducible_says_since_when_and_why(project: FeatureProject) -> None:
    """In place of an attempt."""
    first = project.build()
    event = TrainingSetNotReproducible(
        training_set=first["seq"], service="credit", row_hash=first["row_hash"], view="income", table_version=3,
        cause="retention",
    )  # fmt: skip
    project.ledger.append(event, actor="test")
    with pytest.raises(TrainingSetError, match=r"not reproducible since \d{4}-.* \(retention\)"):
        project.again()


def test_missing_files_are_a_refusal_and_other_rows_a_failure(
    project: FeatureProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first can be explained, the second must not happen."""
    first = project.build()
    with monkeypatch.context() as patch:
        ours = first["entities_hash"]
        patch.setattr("feature_jobs.training_set.has_row_hash", lambda table, expected: expected == ours)
        with pytest.raises(Inconsistent, match="Built again"):
            project.again()
    assert not (project.root.parent / "again.parquet").exists()
    next(Path(project.uri).glob("*/*.parquet")).unlink()
    with pytest.raises(TrainingSetError, match="were removed"):
        project.again()
