"""Tests of a feature service with rules for missing features, from its definition to answers through the edge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

from cluster.ledger.events import SkewChecked
from tests.integration.client import Client

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from datetime import timedelta
from feature_jobs.store import Default, Entity, FeatureService, FeatureView, Field, FileSource, Missing

worker = Entity("worker", join_keys=["worker_id"])
wage = FeatureView(
    "wage",
    entities=[worker],
    ttl=timedelta(days=365),
    source=FileSource("wage.parquet", event_timestamp="at"),
    schema=[Field("amount", "float64")],
)
debts = FeatureView(
    "debts",
    entities=[worker],
    source=FileSource("debts.parquet", event_timestamp="at"),
    schema=[Field("total", "float64")],
)
tips = FeatureView(
    "tips",
    entities=[worker],
    source=FileSource("tips.parquet", event_timestamp="at"),
    schema=[Field("amount", "float64")],
)
tipped = FeatureService("tipped", views=[tips])
careful = FeatureService(
    "careful", views=[wage, debts], missing={"wage__amount": Default(-1.0), "debts": Missing.REFUSE}
)
"""
WORKERS, WITH_WAGE, WITH_DEBTS = 240, 200, 230
KNOWN, WITHOUT_WAGE, WITHOUT_DEBTS = 7, 210, 235
AS_OF = "2024-06-01T00:00:00Z"
AT = pl.lit("2024-01-01").str.to_datetime(time_unit="us", time_zone="UTC")


@pytest.fixture(scope="module")
def project(falaj_cluster: Project) -> Project:
    """Return a project that serves a model trained with this service."""
    root, run = falaj_cluster.root, falaj_cluster.run
    (root / "lending.py").write_text(DEFINITIONS)
    write_data(root)
    run("feature_jobs.apply", "definitions=lending", check=True)
    for view in ("wage", "debts"):
        run("feature_jobs.ingest", "definitions=lending", f"view={view}", check=True)
        run("feature_jobs.materialize", "definitions=lending", f"view={view}", f"as_of={AS_OF}", check=True)
    training = ("service=careful", "entities=workers.parquet", "output=careful.parquet")
    run("feature_jobs.training_set", "definitions=lending", *training, check=True)
    small = ("model=lightgbm", "model.rounds=10", "model.min_data_in_leaf=5", "model.num_threads=1")
    data = ("name=careful", "training_set=careful.parquet", "label=rich", "split.column=worker_id")
    run("jobs.train", *small, *data, check=True)
    run("serve_apps.deploy", "name=careful", check=True)
    return falaj_cluster


def write_data(root: Path) -> None:
    frame = pl.DataFrame({"worker_id": list(range(WORKERS))}).with_columns(
        AT.alias("at"), amount=(pl.col("worker_id") * 37 % 101).cast(pl.Float64)
    )
    frame.head(WITH_WAGE).write_parquet(root / "wage.parquet")
    frame.head(WITH_DEBTS).rename({"amount": "total"}).write_parquet(root / "debts.parquet")
    frame.select(
        "worker_id",
        event_timestamp=pl.lit("2024-03-01").str.to_datetime(time_unit="us", time_zone="UTC"),
        rich=(pl.col("amount") > 50).cast(pl.Int64),
    ).write_parquet(root / "workers.parquet")


def predict(project: Project, *workers: int, **more: Any) -> tuple[int, dict[str, Any]]:
    body = {"entities": [{"worker_id": worker} for worker in workers], "as_of": AS_OF, **more}
    return Client(project).call("/v1/models/careful:predict", body, unit="u")


def test_the_training_set_holds_the_defaults(project: Project) -> None:
    """The training set has the default for a worker without a wage.

    A feature whose absence is refused online stays null.
    """
    rows = pl.read_parquet(project.root / "careful.parquet")
    assert (rows["wage__amount"] == -1.0).sum() == WORKERS - WITH_WAGE
    assert rows["debts__total"].null_count() == WORKERS - WITH_DEBTS
    manifest = json.loads((project.root / "careful.manifest.json").read_text())
    assert manifest["default_share"] == {"wage__amount": (WORKERS - WITH_WAGE) / WORKERS}


def test_answers_say_what_stood_in_and_what_was_refused(project: Project) -> None:
    """Answers through the edge name the defaults that were used, and the feature that caused a refusal.

    Reading features returns the stored values without defaults.
    """
    status, content = predict(project, KNOWN, WITHOUT_WAGE)
    assert status == 200, content
    assert content["features_status"] == {"wage__amount": ["present", "missing"]}
    assert content["features_defaults"] == {"wage__amount": -1.0}
    status, content = predict(project, KNOWN, WITHOUT_DEBTS)
    assert (status, content["code"]) == (400, 400)
    assert content["features_status"] == {"debts__total": ["present", "missing"]}
    assert "Feature 'total' of view 'debts' is missing for entities[1]" in content["error"]
    assert predict(project, WITHOUT_DEBTS, features={"debts__total": 3.0})[0] == 200
    body = {"service": "careful", "entities": [{"worker_id": WITHOUT_DEBTS}], "as_of": AS_OF}
    status, content = Client(project).call("/v1/features:read", body)
    assert (status, content["features"]["wage__amount"]) == (200, [None])
    assert content["status"] == {"wage__amount": ["missing"], "debts__total": ["missing"]}


def push(project: Project, worker: int | str, at: str = "2024-02-01T00:00:00Z") -> tuple[int, dict[str, Any]]:
    row = {"keys": {"worker_id": worker}, "features": {"amount": 2.0}, "event_timestamp": at}
    body = {"view": "tips", "rows": [row], "idempotency_key": f"{worker} {at}"}
    return Client(project).call("/v1/features:push", body)


def test_a_bad_push_before_the_first_batch_stops_nothing(project: Project) -> None:
    """A push with a wrong key type before the first batch does not block ingestion.

    The first batch decides the type of keys. Later pushes must use this type, and so must reads.
    """
    assert push(project, 7)[0] == 200
    times = pl.lit("2024-01-01").str.to_datetime(time_unit="us", time_zone="UTC")
    known = pl.DataFrame({"worker_id": ["a", "b"], "amount": [1.0, 1.0]}).with_columns(at=times)
    known.write_parquet(project.root / "tips.parquet")
    project.run("feature_jobs.ingest", "definitions=lending", "view=tips", check=True)
    assert push(project, "a")[0] == 200
    status, content = push(project, 8)
    assert (status, "rows[0].keys.worker_id must be text" in content["error"]) == (400, True)
    _, content = push(project, "a", at="2999-01-01T00:00:00Z")
    assert "event_timestamp lies in the future" in content["quarantined"][0]["reason"]
    streamed = project.run("feature_jobs.stream", "source=push", "view=tips", "once=true", check=True).stdout
    assert "3 pushed rows taken: 1 into the table, 2 quarantined" in streamed
    for moment, values, known_then in ((AS_OF, [2.0], "present"), ("2024-01-15T00:00:00Z", [None], "newer")):
        body = {"service": "tipped", "entities": [{"worker_id": "a"}], "as_of": moment}
        status, content = Client(project).call("/v1/features:read", body)
        assert (status, content["features"]) == (200, {"tips__amount": values})
        assert content["status"] == {"tips__amount": [known_then]}
    status, content = Client(project).call("/v1/features:read", body | {"service": "tiped"})
    assert (status, content["error"]) == (404, "No feature service 'tiped' has been applied.")


def test_defaults_are_no_skew(project: Project) -> None:
    """The skew check reads the same requests again. It does not count a default as a mismatch."""
    assert predict(project, WITHOUT_WAGE)[0] == 200
    project.run("feature_jobs.skew", "name=careful", check=True)
    ledger = project.ledger()
    [checked] = [
        entry.payload for entry in ledger.entries(SkewChecked) if entry.payload["model"] == "careful"
    ]
    ledger.close()
    assert checked["mismatches"] == 0
    assert checked["features"]["wage__amount"]["equal"] == checked["rows"] > 0
