"""Tests of lineage from source columns to deployments, as text, JSON and OpenLineage events."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from openlineage.client.serde import Serde

from cluster.errors import LedgerCorrupt, ModelNotFound
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
from cluster.lineage.openlineage import run_events
from cluster.lineage.trace import ModelTrace, describe, read_entries, source_name, trace_model
from cluster.settings import PlatformConfig, StorageConfig
from tests.processes.commands import run_main


def traced(ledger: Ledger, model: str, version: int | str) -> ModelTrace:
    """The trace of the entries that the event index finds. It is the same as that of all entries."""
    trace = trace_model(read_entries(ledger, model, version), model, version)
    assert trace == trace_model(ledger.entries(), model, version)
    return trace


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
    rows = {"rows_in": 3, "rows_stored": 3, "rows_quarantined": 0}
    names = {
        "view": view,
        "view_version": "1",
        "ingest_id": f"{view}{table_version}",
        "source": f"{view}.parquet",
    }
    return BatchIngested(
        source_digest="d" * 64, table_version=table_version, source_columns=columns, **rows, **names
    )


def registered(version: int, training_set: str) -> LedgerEvent:
    lineage = {"training_set_hash": training_set}
    rest: dict[str, Any] = {
        "family": "lightgbm",
        "task": "binary",
        "manifest_hash": "",
        "files": {},
        "metrics": {},
    }
    return ModelRegistered(name="loan", version=version, lineage=lineage, **rest)


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
def trace(ledger: Ledger) -> ModelTrace:
    return traced(ledger, "loan", 1)


def test_each_column_is_traced_to_its_source_columns(trace: ModelTrace) -> None:
    """Without a transform by name; with one by the declared columns, or all columns if none are declared."""
    sources = [(column.column, column.source, column.source_columns) for column in trace.columns]
    assert sources == [
        ("income__amount", "income.parquet", ("amount",)),
        ("income__sector", "income.parquet", ("sector",)),
        ("person__band", "person.parquet", ("born",)),
        ("person__grade", "person.parquet", ("*",)),
    ]
    band = trace.columns[2]
    assert (band.transform, band.view) == ("shop:bands", "person")
    assert (band.view_version, band.feature) == ("1", "band")


def test_trace_has_only_batches_and_deployments_of_its_version(trace: ModelTrace) -> None:
    """Later batches, later view versions and other versions' deployments are not included."""
    assert [batch.payload["ingest_id"] for batch in trace.batches] == ["income1", "person1"]
    assert {column.view_version for column in trace.columns} == {"1"}
    assert [entry.payload["app"] for entry in trace.deployments] == ["loan-v1"]


def test_a_training_set_from_elsewhere_has_no_columns(ledger: Ledger) -> None:
    """The text says that the lineage of the columns is unknown."""
    other = traced(ledger, "loan", 2)
    assert (other.training_set, other.columns, other.batches) == (None, [], [])
    assert "lineage of its columns is unknown" in describe(other)


@pytest.mark.parametrize(("version", "number"), [("1", 1), ("latest", 2), ("champion", 1)])
def test_version_can_be_a_number_an_alias_or_latest(ledger: Ledger, version: str, number: int) -> None:
    """All three forms select a version."""
    assert traced(ledger, "loan", version).version == number


@pytest.mark.parametrize(
    ("model", "version", "message"),
    [
        ("lone", 1, "Did you mean 'loan'"),
        ("loan", 9, "1, 2"),
        ("loan", "v1", "neither a number nor an alias"),
    ],
)
def test_unknown_model_version_or_alias_is_refused(
    ledger: Ledger, model: str, version: int | str, message: str
) -> None:
    """The message lists known names or versions."""
    with pytest.raises(ModelNotFound, match=message):
        traced(ledger, model, version)


def test_an_address_with_a_password_is_never_a_sources_name() -> None:
    """A source without path, table or topic gets its view's name."""
    definition = {"name": "income", "source": {"url": "postgresql://ann:secret@db/x", "query": "select 1"}}
    assert source_name(definition) == "income's source"
    assert source_name({"name": "clicks", "source": {"topic": "clicks"}}) == "clicks"


def flags(ledger: Ledger) -> list[str]:
    """Return the command's arguments for the model of `EVENTS`."""
    root = str(Path(str(ledger.engine.url.database)).parent)
    return ["--root", root, "--model", "loan", "--version", "1"]


def openlineage(trace: ModelTrace) -> list[dict[str, Any]]:
    return [Serde.to_dict(event) for event in run_events(trace, namespace="n")]


def test_openlineage_traces_a_column_through_every_step(trace: ModelTrace) -> None:
    """Source column, feature, training-set column and prediction are linked."""
    complete_events = {event["job"]["name"]: event for event in openlineage(trace) if event["outputs"]}

    def inputs(job: str, column: str) -> list[tuple[str, str]]:
        [output] = complete_events[job]["outputs"]
        input_fields = output["facets"]["columnLineage"]["fields"][column]["inputFields"]
        return [(source["name"], source["field"]) for source in input_fields]

    rows = f"training_sets/{'a' * 64}"
    assert inputs("feature_jobs.ingest.income", "amount") == [("income.parquet", "amount")]
    assert inputs("feature_jobs.ingest.person", "band") == [("person.parquet", "born")]
    assert inputs("feature_jobs.ingest.person", "grade") == [
        ("person.parquet", name) for name in ("person_id", "born", "school")
    ]
    assert inputs("feature_jobs.training_set.credit", "income__amount") == [("features/income", "amount")]
    assert (rows, "income__amount") in inputs("jobs.train", "prediction")
    assert inputs("serve_apps.deploy", "prediction") == [("models/loan/1", "prediction")]


def test_openlineage_run_ids_are_stable(trace: ModelTrace) -> None:
    """Each run has a START and a COMPLETE event with an id derived from the ledger."""
    events = openlineage(trace)
    assert events == openlineage(trace)
    runs = [event["run"]["runId"] for event in events]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 5
    assert runs[::2] == runs[1::2]
    assert len(set(runs)) == 5


def test_events_are_sent_to_the_configured_address(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPENLINEAGE_URL names the receiver, as for every OpenLineage producer."""
    received: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{server.server_port}")
        run_main(__main__.main, *flags(ledger), "--emit")
        server.shutdown()
    assert [event["eventType"] for event in received] == ["START", "COMPLETE"] * 5


def test_events_without_a_configured_address_are_refused(
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """OpenLineage would only log them. Its own warning, which says that it prints them, is not shown."""
    monkeypatch.delenv("OPENLINEAGE_URL", raising=False)
    arguments = flags(ledger)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lineage", *arguments, "--emit"])
    with pytest.raises(SystemExit) as exited:
        __main__.main()
    assert exited.value.code == 2
    assert "No OpenLineage transport is configured" in capsys.readouterr().err
    assert "will print events" not in caplog.text


def test_an_unknown_view_version_is_refused(ledger: Ledger) -> None:
    """The message names the training set's event, the view and its version."""
    entries = [entry for entry in ledger.entries() if entry.payload.get("view") != "person"]
    built = next(entry.seq for entry in entries if entry.type == "TrainingSetBuilt")
    with pytest.raises(
        LedgerCorrupt, match=f"Event {built} names version 1 of feature view 'person'"
    ) as error:
        trace_model(entries, "loan", 1)
    assert error.value.seq == built


def test_the_command_prints_and_writes_without_a_cluster(ledger: Ledger, tmp_path: Path) -> None:
    """It prints text or JSON, or writes JSON lines to a file."""
    text = run_main(__main__.main, *flags(ledger)).stdout
    assert "income__amount <- income.amount (1) <- amount of income.parquet" in text
    assert "person__grade <- person.grade (1) <- all columns of person.parquet by shop:bands" in text
    assert "deployed as loan-v1, variant champion" in text
    output = tmp_path / "events.jsonl"
    done = run_main(__main__.main, *flags(ledger), "--format", "openlineage", "--output", str(output))
    assert done.stdout == f"wrote the lineage of loan to {output}\n"
    types = [json.loads(line)["eventType"] for line in output.read_text().splitlines()]
    assert types == ["START", "COMPLETE"] * 5
    printed = run_main(__main__.main, *flags(ledger), "--format", "json").stdout
    assert json.loads(printed)["columns"][0]["column"] == "income__amount"
