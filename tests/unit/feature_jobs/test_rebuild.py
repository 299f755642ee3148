"""A training set built again from its manifest: the same rows, whatever happened to the tables since, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from cluster.errors import Inconsistent, TrainingSetError
from cluster.ledger import Ledger
from cluster.ledger.events import TrainingSetBuilt, TrainingSetNotReproducible
from cluster.security.keys.access import KeyAccess, key_store, protected_files
from cluster.settings import StorageConfig
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, Sensitivity, offline
from feature_jobs.store.catalog import Definitions, apply, view_spec
from feature_jobs.store.compaction import as_target, rewrite
from feature_jobs.store.offline import Batch, Snapshot, Target, snapshot
from feature_jobs.store.protection import view_protection
from feature_jobs.training_set import TrainingSetConfig, produce, requested

TIME = pa.timestamp("us", "UTC")
START = datetime(2024, 1, 1, tzinfo=UTC)
INCOME = FeatureView(
    "income",
    entities=[Entity("person", join_keys=["person_id"])],
    source=FileSource("x.parquet", event_timestamp="at"),
    schema=[Field("amount", "float64", sensitivity=Sensitivity.PERSONAL)],
)
PEOPLE = 20


class Project:
    """A storage root with a ledger and one view's table."""

    def __init__(self, root: Path, access: KeyAccess) -> None:
        self.root, self.access = root, access
        self.ledger = Ledger(f"sqlite:///{root}/ledger.db")
        self.uri = f"{root}/features/income"
        self.apply(INCOME)
        self.write_entities(PEOPLE)

    def apply(self, view: FeatureView) -> None:
        services = {"credit": FeatureService("credit", views=[view])}
        apply(Definitions(module="m", views={view.name: view}, services=services), self.ledger, actor="test")

    def write_entities(self, count: int) -> None:
        at = pa.array([START + timedelta(days=9)] * count, TIME)
        pq.write_table(
            pa.table({"person_id": range(count), "event_timestamp": at}), self.root / "people.parquet"
        )

    def ingest(self, number: int, **columns: Any) -> None:
        """A value for each person, an hour after the last one."""
        seq = list(range(number * PEOPLE, (number + 1) * PEOPLE))
        times = pa.array([START + timedelta(hours=number)] * PEOPLE, TIME)
        rows = {
            "person_id": pa.array(range(PEOPLE)),
            "amount": pa.array([float(one) for one in seq]),
            "event_timestamp": times,
            "created_timestamp": times,
            "ingested_at": times,
            "ingest_seq": pa.array(seq),
        }
        table = pa.table(rows | columns)
        offline.create_table(self.uri, table.schema, num_buckets=2)
        target = Target(
            uri=self.uri,
            keys=("person_id",),
            buckets=2,
            protection=view_protection(view_spec(self.ledger, "income")),
            access=self.access,
        )
        batch = Batch(
            ingest_id=f"{number}",
            rows_in=PEOPLE,
            rows_stored=PEOPLE,
            rows_quarantined=0,
            reasons={},
            quarantine=None,
        )
        files = offline.write_files(table, target, name=f"batch{number}")
        offline.check_schema(DeltaTable(self.uri), table.schema, view="income")
        offline.commit(DeltaTable(self.uri), table.schema, files, batch, seq=seq[-1])

    def newest(self) -> Snapshot:
        spec = view_spec(self.ledger, "income")
        return snapshot(
            self.uri,
            view="income",
            keys=["person_id"],
            protection=view_protection(spec),
            access=self.access,
        )

    def build(self, output: str = "train", **given: Any) -> dict[str, Any]:
        """What the command does, but for attaching and the policies."""
        if "manifest" not in given:
            given = {"service": "credit", "entities": f"{self.root}/people.parquet"} | given
        config = TrainingSetConfig(
            storage=StorageConfig(root=str(self.root)), output=f"{self.root.parent}/{output}.parquet", **given
        )
        return produce(config, requested(config, self.ledger), self.ledger, access=self.access, actor="test")

    def again(self, **given: Any) -> dict[str, Any]:
        return self.build("again", manifest=str(self.manifest), **given)

    @property
    def manifest(self) -> Path:
        return self.root.parent / "train.manifest.json"


@pytest.fixture
def project(tmp_path: Path, access: KeyAccess) -> Iterator[Project]:
    (tmp_path / "root").mkdir()
    project = Project(tmp_path / "root", access)
    for number in range(3):
        project.ingest(number)
    yield project
    project.ledger.engine.dispose()


def test_the_same_rows_after_corrections_compaction_rotation_and_a_new_definition(project: Project) -> None:
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


def test_the_switch_is_pinned_too(project: Project) -> None:
    """Whatever the command line says."""
    late = pa.array([START + timedelta(days=20)] * PEOPLE, TIME)
    project.ingest(3, created_timestamp=late)
    first = project.build(cutoff=False)
    assert (first["cutoff"], first["row_hash"]) == (False, project.again(cutoff=True)["row_hash"])
    assert project.build("other")["row_hash"] != first["row_hash"]


def test_share_that_the_cutoff_leaves_without_values_is_in_the_manifest(project: Project) -> None:
    """Of all entity rows, those for whom nothing was known yet."""
    project.write_entities(PEOPLE)
    table = pq.read_table(project.root / "people.parquet")
    early = pa.array([START - timedelta(hours=1)] * PEOPLE, TIME)
    pq.write_table(table.set_column(1, "event_timestamp", early), project.root / "people.parquet")
    assert project.build()["hidden_share"] == {"income": 0.0}
    project.ingest(3, event_timestamp=early)
    assert project.build()["hidden_share"] == {"income": 1.0}


def test_other_entity_rows_are_refused(project: Project) -> None:
    """Before anything is joined."""
    project.build()
    project.write_entities(PEOPLE - 1)
    with pytest.raises(TrainingSetError, match="are not those of"):
        project.again()


def test_manifest_that_was_altered_or_is_none_is_refused(project: Project) -> None:
    """The ledger knows what was built."""
    project.build()
    content = json.loads(project.manifest.read_text())
    for changes, words in (
        ({"table_versions": {"income": 1}}, "has no training set"),
        ({"cutoff": False}, "has no training set"),
        ({"seq": 1}, "has no training set"),
        ({"row_hash": None, "seq": "x"}, "is no manifest"),
    ):
        project.manifest.write_text(json.dumps(content | changes))
        with pytest.raises(TrainingSetError, match=words):
            project.again()
    project.manifest.unlink()
    with pytest.raises(TrainingSetError, match="No manifest"):
        project.again()


def test_manifest_of_an_older_release_is_built_again(project: Project) -> None:
    """It does not name its entity rows, and the cutoff was always on."""
    first = project.build()
    content = json.loads(project.manifest.read_text())
    for name in ("entities", "cutoff", "hidden_share"):
        del content[name]
    project.manifest.write_text(json.dumps(content))
    with pytest.raises(TrainingSetError, match="does not say where"):
        project.again()
    assert project.again(entities=f"{project.root}/people.parquet")["row_hash"] == first["row_hash"]


def test_marked_not_reproducible_says_since_when_and_why(project: Project) -> None:
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
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first can be explained, the second must not happen."""
    first = project.build()
    with monkeypatch.context() as patch:
        patch.setattr("feature_jobs.training_set.row_hash", lambda table: first["entities_hash"])
        with pytest.raises(Inconsistent, match="Built again"):
            project.again()
    assert not (project.root.parent / "again.parquet").exists()
    next(Path(project.uri).glob("*/*.parquet")).unlink()
    with pytest.raises(TrainingSetError, match="were removed"):
        project.again()
