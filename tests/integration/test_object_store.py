"""Tests of the whole path from rows to an answer, with shared state in an object store and PostgreSQL.

The store is moto, a test double of S3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest

from cluster.records.segments import list_segments
from tests.integration.client import Client
from tests.integration.conftest import Project, new_project
from tests.servers.object_store import BUCKET, object_store
from tests.servers.polling import wait_until
from tests.servers.postgresql import running_server

ROOT = f"s3://{BUCKET}/project"
STORAGE = ("storage=s3", f"storage.root={ROOT}", "storage.upload_after_s=1", "replica.durability=shared")
ROWS = 400
DEFINITIONS = """
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, NotNull, Sensitivity

customer = Entity("customer", join_keys=["customer_id"])
income = FeatureView(
    "income",
    entities=[customer],
    source=FileSource("income.parquet", event_timestamp="at"),
    schema=[Field("amount", "float64", sensitivity=Sensitivity.PERSONAL)],
    checks=[NotNull("amount")],
)
credit = FeatureService("credit", views=[income])
"""


class SharedProject(NamedTuple):
    """A project whose shared state is in an object store and PostgreSQL."""

    project: Project
    options: tuple[str, ...]
    """Options of every command."""

    def run(self, module: str, *arguments: str) -> str:
        """Run a command that must succeed, and return its output."""
        return self.project.run(module, *arguments, *self.options, check=True).stdout


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedProject]:
    with object_store() as variables, running_server() as address:
        project = new_project(tmp_path_factory.mktemp("remote"))
        project.env.update(variables)
        options = (*STORAGE, f"ledger.url={address}")
        project.up(*options)
        try:
            yield SharedProject(project, options)
        finally:
            project.run("cluster.down", *options)


def write_rows(root: Path) -> None:
    """Write the definitions, the source with one bad row, and the entity rows with labels."""
    (root / "shop.py").write_text(DEFINITIONS)
    customers = pl.DataFrame({"customer_id": range(ROWS)})
    day = pl.lit("2026-01-01").str.to_datetime(time_unit="us", time_zone="UTC")
    amount = pl.when(pl.col("customer_id") == 5).then(None).otherwise(pl.col("customer_id") % 40 * 1.0)
    customers.with_columns(amount=amount, at=day).write_parquet(root / "income.parquet")
    labels = customers.with_columns(
        repaid=(pl.col("customer_id") % 40 >= 20).cast(pl.Int64), event_timestamp=day.dt.offset_by("1mo")
    )
    labels.write_parquet(root / "people.parquet")


def test_rows_become_an_answer_and_only_local_state_is_on_the_disk(shared: SharedProject) -> None:
    """Each step reads from the object store what the step before it has written."""
    project = shared.project
    write_rows(project.root)
    definitions = "definitions=shop"
    shared.run("feature_jobs.apply", definitions)
    ingested = shared.run("feature_jobs.ingest", definitions, "view=income")
    assert f"{ROWS} rows in = {ROWS - 1} stored + 1 quarantined" in ingested
    assert "amount is null" in shared.run("feature_jobs.quarantine", "view=income")
    training_set = (definitions, "service=credit", "entities=people.parquet", "output=train.parquet")
    shared.run("feature_jobs.training_set", *training_set)
    shared.run("feature_jobs.materialize", definitions, "view=income")
    train = ("model=lightgbm", "name=loan", "training_set=train.parquet", "label=repaid")
    shared.run("jobs.train", *train)
    shared.run("serve_apps.deploy", "name=loan", "version=1")
    status, content = Client(project).call(
        "/v1/models/loan:predict", {"entities": [{"customer_id": 39}]}, unit="39"
    )
    assert status == 200
    assert content["predictions"][0]["label"] == 1
    assert not {"features", "models", "quarantine"} & {path.name for path in project.storage_root.iterdir()}


def test_prediction_log_leaves_the_node(shared: SharedProject) -> None:
    """The answered record is readable at once without the node's disk, and later in the table of the object store."""
    assert re.search(r"log uploader +running", shared.run("cluster.status"))
    folder = shared.project.storage_root / "predictions" / "loan"
    wait_until(lambda: not any(map(num_records, list_segments(folder))), "the upload", seconds=60)
    compacted = shared.run("jobs.compact_log", "name=loan")
    assert re.search(r"predictions of loan: 1 segments taken, 1 records in the table; log: pred", compacted)
    assert not (folder / "table").exists()
    assert "all logs until" in shared.run("cluster.records.nodes")


def num_records(path: Path) -> int:
    """Return the number of records of a segment, 0 after it was removed."""
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0
