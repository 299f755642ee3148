"""Ingestion through Ray: bad rows set apart, bad batches refused whole, the same batch never stored twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from deltalake import DeltaTable

from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import BatchIngested, BatchRefused
from cluster.settings import PlatformConfig, StorageConfig

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from feature_jobs.store import Entity, FeatureView, Field, FileSource, Range

meter = Entity("meter", join_keys=["meter_id"])
reading = FeatureView(
    "reading",
    entities=[meter],
    source=FileSource("reading.parquet", event_timestamp="at"),
    schema=[Field("watts", "float64")],
    checks=[Range("watts", minimum=0)],
)
"""
INGEST = ("definitions=meters", "view=reading")


@pytest.fixture(scope="module")
def project(falaj_cluster: Project) -> Project:
    """The project with the meters' definitions applied."""
    (falaj_cluster.root / "meters.py").write_text(DEFINITIONS)
    falaj_cluster.run("feature_jobs.apply", "definitions=meters", check=True)
    return falaj_cluster


def write(root: Path, name: str, watts: list[Any]) -> str:
    frame = pl.DataFrame(
        {"meter_id": range(len(watts)), "watts": watts, "at": ["2024-01-01T00:00:00"] * len(watts)}
    )
    frame.with_columns(pl.col("at").str.to_datetime(time_unit="us", time_zone="UTC")).write_parquet(
        root / name
    )
    return f"source.path={name}"


def ledger(project: Project) -> Ledger:
    return open_ledger(PlatformConfig(storage=StorageConfig(root=str(project.storage_root))))


def stored(project: Project) -> pl.DataFrame:
    """The stored rows' public columns, as any Delta reader sees them."""
    return pl.scan_delta(str(project.storage_root / "features" / "reading")).select("ingest_seq").collect()


def test_rows_in_are_rows_stored_plus_rows_quarantined(project: Project) -> None:
    """A bad row lies in quarantine with its reason and what the source said; a second run changes nothing."""
    source = write(project.root, "mixed.parquet", [1.0, -1.0] + [2.0] * 98)
    project.run("feature_jobs.ingest", *INGEST, source, check=True)
    again = project.run("feature_jobs.ingest", *INGEST, source, check=True)
    [entry] = ledger(project).entries(BatchIngested)
    batch = entry.payload
    assert (batch["rows_in"], batch["rows_stored"], batch["rows_quarantined"]) == (100, 99, 1)
    [bad] = project.read(project.storage_root / "quarantine" / "reading" / batch["quarantine"]).to_dicts()
    assert json.loads(bad["raw"])["watts"] == -1.0
    assert "watts" in bad["reason"]
    assert "already" in again.stdout
    assert stored(project).height == 99
    assert stored(project)["ingest_seq"].n_unique() == 99


@pytest.mark.parametrize(
    ("watts", "said"), [([-1.0] * 50 + [1.0] * 50, "50.0% of 100 rows"), (["many"] * 10, "watts")]
)
def test_a_bad_batch_is_refused_whole(project: Project, watts: list[Any], said: str) -> None:
    """Nothing of it is stored, and the ledger says why."""
    before = stored(project).height
    result = project.run("feature_jobs.ingest", *INGEST, write(project.root, "bad.parquet", watts))
    assert result.returncode == 2
    assert said in result.stderr
    *_, last = ledger(project).entries(BatchRefused)
    assert said in last.payload["reason"]
    assert stored(project).height == before


def test_a_commit_without_its_event_is_found_again(project: Project) -> None:
    """Killed between the table's commit and the ledger: the next run writes the event and no row."""
    source = write(project.root, "killed.parquet", [3.0] * 20)
    project.run("feature_jobs.ingest", *INGEST, source, check=True)
    table = project.storage_root / "features" / "reading"
    version, rows = DeltaTable(str(table)).version(), stored(project).height
    with ledger(project).writing() as connection:
        last_batch = "SELECT max(seq) FROM events WHERE type = 'BatchIngested'"
        connection.exec_driver_sql(f"DELETE FROM events WHERE seq >= ({last_batch})")
    project.run("feature_jobs.ingest", *INGEST, source, check=True)
    *_, last = ledger(project).entries(BatchIngested)
    assert (last.payload["rows_stored"], last.payload["table_version"]) == (20, version)
    assert (DeltaTable(str(table)).version(), stored(project).height) == (version, rows)
