"""From a source's column to a deployment, as the ledger tells it, and the same in OpenLineage's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelNotFound
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import (
    AliasMoved,
    BatchIngested,
    FeatureViewApplied,
    LedgerEvent,
    ModelDeployed,
    ModelRegistered,
    TrainingSetBuilt,
)
from cluster.lineage import __main__
from cluster.lineage import trace as lineage
from cluster.lineage.openlineage import run_events
from cluster.lineage.trace import Column, ModelTrace, describe, trace_model
from cluster.settings import PlatformConfig, StorageConfig


def applied(
    view: str, version: str, fields: list[dict[str, Any]], transform: str | None = None
) -> LedgerEvent:
    definition = {
        "name": view,
        "schema": fields,
        "source": {"path": f"{view}.parquet"},
        "transform": None if transform is None else {"name": transform, "sha256": "0"},
    }
    return FeatureViewApplied(view=view, version=version, definition=definition)


def ingested(view: str, table_version: int, columns: list[str]) -> LedgerEvent:
    return BatchIngested(
        view=view,
        view_version="1",
        ingest_id=f"{view}{table_version}",
        source=f"{view}.parquet",
        source_digest="d" * 64,
        rows_in=3,
        rows_stored=3,
        rows_quarantined=0,
        table_version=table_version,
        source_columns=columns,
    )


def registered(version: int, training_set: str) -> LedgerEvent:
    return ModelRegistered(
        name="loan",
        version=version,
        family="lightgbm",
        task="binary",
        manifest_hash="",
        files={},
        lineage={"training_set_hash": training_set},
        metrics={},
    )


EVENTS = [
    applied("income", "1", [{"name": "amount"}, {"name": "sector"}]),
    applied("person", "1", [{"name": "band", "from_columns": ["born"]}, {"name": "grade"}], "shop:bands"),
    ingested("income", 1, ["customer_id", "amount", "sector"]),
    ingested("person", 1, ["person_id", "born", "school"]),
    TrainingSetBuilt(
        service="credit",
        service_version="1",
        rows=3,
        row_hash="a" * 64,
        entities_hash="",
        table_versions={"income": 1, "person": 1},
        view_versions={"income": "1", "person": "1"},
        output="train.parquet",
    ),
    ingested("income", 2, ["customer_id", "amount", "sector"]),
    applied("income", "2", [{"name": "amount"}]),
    registered(1, "a" * 64),
    registered(2, "b" * 64),
    ModelDeployed(name="loan", version=1, variant="champion", app="loan-v1", route_prefix="/loan-v1"),
    AliasMoved(name="loan", alias="champion", version=1, previous=None, reason="deployed"),
    ModelDeployed(name="loan", version=2, variant="challenger", app="loan-v2", route_prefix="/loan-v2"),
]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    root = tmp_path_factory.mktemp("lineage") / ".falaj"
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(root))))
    for event in EVENTS:
        ledger.append(event, actor="ann")
    return ledger


@pytest.fixture(scope="module")
def found(ledger: Ledger) -> ModelTrace:
    return trace_model(ledger.entries(), "loan", 1)


def test_each_column_is_followed_to_its_source(found: ModelTrace) -> None:
    """By name without a transform; as declared with one, and from all columns where nothing is declared."""
    ways = [(one.column, one.source, one.source_columns) for one in found.columns]
    assert ways == [
        ("income__amount", "income.parquet", ("amount",)),
        ("income__sector", "income.parquet", ("sector",)),
        ("person__band", "person.parquet", ("born",)),
        ("person__grade", "person.parquet", ("*",)),
    ]
    assert found.columns[2] == Column(
        source="person.parquet",
        source_columns=("born",),
        transform="shop:bands",
        view="person",
        view_version="1",
        feature="band",
        column="person__band",
    )


def test_only_what_the_version_saw_and_where_it_went_is_told(found: ModelTrace) -> None:
    """Not the batch after the pinned table version, not the view's next version, not another one's deployment."""
    assert [one.payload["ingest_id"] for one in found.batches] == ["income1", "person1"]
    assert {one.view_version for one in found.columns} == {"1"}
    assert [one.payload["app"] for one in found.deployments] == ["loan-v1"]


def test_a_training_set_from_elsewhere_has_no_columns(ledger: Ledger) -> None:
    """That is said, and not guessed."""
    other = trace_model(ledger.entries(), "loan", 2)
    assert (other.training_set, other.columns, other.batches) == (None, [], [])
    assert "lineage of its columns is unknown" in describe(other)


@pytest.mark.parametrize(("version", "number"), [("1", 1), ("latest", 2), ("champion", 1)])
def test_a_version_is_named_as_in_other_commands(ledger: Ledger, version: str, number: int) -> None:
    """By its number, by an alias, or as the latest."""
    assert trace_model(ledger.entries(), "loan", version).version == number


@pytest.mark.parametrize(
    ("model", "version", "said"),
    [
        ("lone", 1, "Did you mean 'loan'"),
        ("loan", 9, "1, 2"),
        ("loan", "v1", "neither a number nor an alias"),
    ],
)
def test_what_is_unknown_is_refused_by_name(
    ledger: Ledger, model: str, version: int | str, said: str
) -> None:
    """With what there is."""
    with pytest.raises(ModelNotFound, match=said):
        trace_model(ledger.entries(), model, version)


def test_an_address_with_a_password_is_never_a_sources_name() -> None:
    """A lineage goes to other tools."""
    definition = {"name": "income", "source": {"url": "postgresql://ann:secret@db/x", "query": "select 1"}}
    assert lineage.source_name(definition) == "income's source"
    assert lineage.source_name({"name": "clicks", "source": {"topic": "clicks"}}) == "clicks"


def test_openlineage_follows_a_column_through_every_step(found: ModelTrace) -> None:
    """From the source's column by the feature and the training set's column to the prediction."""
    done = {event["job"]["name"]: event for event in run_events(found, namespace="n") if event["outputs"]}

    def inputs(job: str, column: str) -> list[tuple[str, str]]:
        [output] = done[job]["outputs"]
        read = output["facets"]["columnLineage"]["fields"][column]["inputFields"]
        return [(one["name"], one["field"]) for one in read]

    rows = f"training_sets/{'a' * 64}"
    assert inputs("feature_jobs.ingest.income", "amount") == [("income.parquet", "amount")]
    assert inputs("feature_jobs.ingest.person", "band") == [("person.parquet", "born")]
    assert inputs("feature_jobs.ingest.person", "grade") == [
        ("person.parquet", name) for name in ("person_id", "born", "school")
    ]
    assert inputs("feature_jobs.training_set.credit", "income__amount") == [("features/income", "amount")]
    assert (rows, "income__amount") in inputs("jobs.train", "prediction")
    assert inputs("serve_apps.deploy", "prediction") == [("models/loan/1", "prediction")]


def test_openlineage_tells_the_same_runs_every_time(found: ModelTrace) -> None:
    """Each starts and completes, under an id that follows from the ledger."""
    events = list(run_events(found, namespace="n"))
    assert events == list(run_events(found, namespace="n"))
    runs = [event["run"]["runId"] for event in events]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 5
    assert runs[::2] == runs[1::2]
    assert len(set(runs)) == 5


def test_openlineages_own_classes_accept_the_events(found: ModelTrace) -> None:
    """They check ids, times and addresses when they are made."""
    pytest.importorskip("openlineage.client", reason="openlineage-python is not installed")
    from openlineage.client import event_v2
    from openlineage.client.generated import column_lineage_dataset as columns
    from openlineage.client.generated import dataset_version_dataset as versions

    def facets(said: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if "columnLineage" in said:
            made["columnLineage"] = columns.ColumnLineageDatasetFacet(
                fields={
                    name: columns.Fields(
                        inputFields=[
                            columns.InputField(
                                **one
                                | {
                                    "transformations": [
                                        columns.Transformation(**t) for t in one["transformations"]
                                    ]
                                }
                            )
                            for one in field["inputFields"]
                        ]
                    )
                    for name, field in said["columnLineage"]["fields"].items()
                }
            )
            assert said["columnLineage"]["_schemaURL"] == made["columnLineage"]._schemaURL
        if "version" in said:
            made["version"] = versions.DatasetVersionDatasetFacet(said["version"]["datasetVersion"])
            assert said["version"]["_schemaURL"] == made["version"]._schemaURL
        return made

    for event in run_events(found, namespace="n"):
        made = event_v2.RunEvent(
            eventTime=event["eventTime"],
            producer=event["producer"],
            eventType=event_v2.RunState[event["eventType"]],
            run=event_v2.Run(**event["run"]),
            job=event_v2.Job(**event["job"]),
            inputs=[
                event_v2.InputDataset(one["namespace"], one["name"], facets(one.get("facets", {})))
                for one in event["inputs"]
            ],
            outputs=[
                event_v2.OutputDataset(one["namespace"], one["name"], facets(one.get("facets", {})))
                for one in event["outputs"]
            ],
        )
        assert made.schemaURL == event["schemaURL"]


def test_the_command_prints_and_writes_without_a_cluster(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Text for people, JSON lines for tools."""
    root = str(Path(str(ledger.engine.url.database)).parent)
    flags = ["lineage", "--root", root, "--model", "loan", "--version", "1"]
    monkeypatch.setattr("sys.argv", flags)
    __main__.main()
    said = capsys.readouterr().out
    assert "income__amount <- income.amount (1) <- amount of income.parquet" in said
    assert "person__grade <- person.grade (1) <- all columns of person.parquet by shop:bands" in said
    assert "deployed as loan-v1, variant champion" in said
    output = tmp_path / "events.jsonl"
    monkeypatch.setattr("sys.argv", [*flags, "--format", "openlineage", "--output", str(output)])
    __main__.main()
    assert [json.loads(line)["eventType"] for line in output.read_text().splitlines()] == [
        "START",
        "COMPLETE",
    ] * 5
    monkeypatch.setattr("sys.argv", [*flags, "--format", "json"])
    __main__.main()
    assert json.loads(capsys.readouterr().out)["columns"][0]["column"] == "income__amount"
