"""Tests of the training set commands.

They compare one process and Ray tasks with DuckDB, build a training set again, and build it after retention.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest

from cluster.ledger.events import RowsRemoved, TrainingSetNotReproducible
from tests.samples.pit_oracle import START, Rows, connect, expected, random_entities, random_features

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from datetime import timedelta
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource

shopper = FeatureView(
    "shopper",
    entities=[Entity("shopper", join_keys=["shopper_id"])],
    source=FileSource("shopper0.parquet", event_timestamp="at", created_timestamp="known", deleted="gone"),
    schema=[Field("amount", "float64"), Field("place", "string")],
    ttl=timedelta(hours=6),
    retention=timedelta(days=30),
)
town = FeatureView(
    "town",
    entities=[Entity("town", join_keys=["place"])],
    source=FileSource("town0.parquet", event_timestamp="at", created_timestamp="known", deleted="gone"),
    schema=[Field("rate", "float64")],
)
shop = FeatureService("shop", views=[shopper, town])
"""
PLACES = ["n", "s", "w"]
VALUES: dict[str, dict[str, list[Any]]] = {
    "shopper": {"shopper_id": list(range(12)), "amount": [None, 0.5, 1.5, 2.5], "place": [None, *PLACES]},
    "town": {"place": PLACES, "rate": [None, 0.5, 1.5, 2.5]},
}
SIZES = {"shopper": (150, 150), "town": (60,)}


def ingest(project: Project, view: str, frame: pl.DataFrame, number: int) -> pl.DataFrame:
    """Ingest a batch, and return its rows in the order of their sequence numbers."""
    given = {"event_timestamp": "at", "created_timestamp": "known", "deleted": "gone"}
    frame.drop("ingest_seq").rename(given).write_parquet(project.root / f"{view}{number}.parquet")
    source = f"source.path={view}{number}.parquet"
    project.run(
        "feature_jobs.ingest", "definitions=shop", f"view={view}", "num_buckets=3", source, check=True
    )
    return frame


@pytest.fixture(scope="module")
def tables(falaj_cluster: Project) -> dict[str, pl.DataFrame]:
    """Ingest two views with tombstones and corrections, one of them in two batches, and write entity rows."""
    root, draw = falaj_cluster.root, np.random.default_rng(5)
    (root / "shop.py").write_text(DEFINITIONS)
    falaj_cluster.run("feature_jobs.apply", "definitions=shop", check=True)
    found = {
        view: pl.concat(
            ingest(falaj_cluster, view, random_features(draw, size, VALUES[view]), number)
            for number, size in enumerate(sizes)
        ).with_columns(pl.int_range(pl.len()).alias("ingest_seq"))
        for view, sizes in SIZES.items()
    }
    entities = random_entities(draw, 400, {"shopper_id": [None, *range(13)]})
    entities.write_parquet(root / "shoppers.parquet")
    return found | {"entities": entities}


def build(project: Project, output: str, *more: str) -> dict[str, Any]:
    """Build a training set, and return its manifest."""
    project.run(
        "feature_jobs.training_set", "definitions=shop", f"output={output}.parquet", *more, check=True
    )
    content: dict[str, Any] = json.loads((project.root / f"{output}.manifest.json").read_text())
    return content


SERVICE = ("service=shop", "entities=shoppers.parquet")


def definition(tables: dict[str, pl.DataFrame], at: int) -> Rows:
    """Return the expected values of the service's three columns, with the cutoff (`at=0`) or without it (`at=1`)."""
    oracle, asked = connect(), tables["entities"]
    people = expected(
        oracle,
        asked,
        tables["shopper"],
        keys=["shopper_id"],
        columns=["amount", "place"],
        ttl=timedelta(hours=6),
    )[at]
    asked = asked.with_columns(pl.Series("place", [row[1] for row in people], pl.String))
    towns = expected(oracle, asked, tables["town"], keys=["place"], columns=["rate"], ttl=None)[at]
    return [(*person[:2], town[0]) for person, town in zip(people, towns, strict=True)]


def rows(path: Path) -> Rows:
    columns = ["shopper__amount", "shopper__place", "town__rate"]
    return pl.read_parquet(path).select(columns).rows()


@pytest.mark.parametrize("cutoff", [True, False])
def test_one_process_and_ray_tasks_give_what_the_definition_says(
    falaj_cluster: Project, tables: dict[str, pl.DataFrame], cutoff: bool
) -> None:
    """One process and Ray tasks give the expected rows, with equal row hashes.

    The data has tombstones, corrections, ties, expired values, and a key from an earlier view.
    """
    more = (*SERVICE, f"cutoff={str(cutoff).lower()}")
    here = build(falaj_cluster, "here", *more)
    tasks = build(falaj_cluster, "tasks", *more, "task_rows=1")
    assert here["row_hash"] == tasks["row_hash"]
    assert here["hidden_share"] == tasks["hidden_share"]
    assert any(here["hidden_share"].values()) == cutoff
    for name in ("here", "tasks"):
        assert rows(falaj_cluster.root / f"{name}.parquet") == definition(tables, 0 if cutoff else 1)


def test_built_again_until_retention_took_rows_away(
    falaj_cluster: Project, tables: dict[str, pl.DataFrame]
) -> None:
    """A training set can be built again after compaction and corrections.

    Other entity rows are refused. After retention has removed rows, the refusal is one line.
    """
    first = build(falaj_cluster, "first", *SERVICE)
    again = ("manifest=first.manifest.json",)
    correction = random_features(np.random.default_rng(6), 100, VALUES["shopper"])
    ingest(falaj_cluster, "shopper", correction, 2)
    falaj_cluster.run("feature_jobs.compact", "definitions=shop", "view=shopper", check=True)
    assert build(falaj_cluster, "again", *again)["row_hash"] == first["row_hash"]
    assert build(falaj_cluster, "newer", *SERVICE)["row_hash"] != first["row_hash"]
    tables["entities"].head(5).write_parquet(falaj_cluster.root / "few.parquet")
    command = ("feature_jobs.training_set", "output=no.parquet", *again)
    refused = falaj_cluster.run(*command, "entities=few.parquet")
    assert (refused.returncode, "are not those of" in refused.stderr) == (2, True)
    now = (START + timedelta(days=30, hours=1)).isoformat()
    done = falaj_cluster.run(
        "feature_jobs.retain", "definitions=shop", "view=shopper", f"now={now}", check=True
    )
    assert " of 400 rows removed" in done.stdout
    refused = falaj_cluster.run(*command)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "not reproducible since" in refused.stderr
    marked = [
        entry.payload["training_set"] for entry in falaj_cluster.ledger().entries(TrainingSetNotReproducible)
    ]
    assert first["seq"] in marked
    (event,) = falaj_cluster.ledger().entries(RowsRemoved)
    assert event.payload["rows_after"] < event.payload["rows_before"] == 400
    assert build(falaj_cluster, "after", *SERVICE)["rows"] == tables["entities"].height
