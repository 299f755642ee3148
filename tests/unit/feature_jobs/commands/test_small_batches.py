"""Ingestion of small batches in one process. No cluster runs in these tests, so attaching to one would fail."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cluster.errors import BatchRejected, ClusterNotRunning, RefusedError, SchemaMismatch, SourceError
from cluster.ledger.events import BatchIngested, FeatureViewStateChanged
from cluster.ledger.events import BatchRefused as BatchRefusedEvent
from feature_jobs.batches.multiple_views import (
    ALL,
    for_each,
    resolve_views,
    validate_views,
    views_with_batches,
)
from feature_jobs.batches.rules import describe_ignored
from feature_jobs.store import Entity, FeatureView, Field, FileSource
from feature_jobs.store.catalog.specifications import view_spec
from tests.projects.batch import BatchProject, keys_of
from tests.projects.tables import pin, target_of
from tests.servers.key_broker import running_broker

AT = "2024-01-01T00:00:00Z"
VIEWS = ("parquet", "csv", "json", "sql")
DEFINITIONS = """
from feature_jobs.store import Entity, FeatureView, Field, FileSource, KafkaSource, Range, SqlSource, Unique

SOURCES = {{
    "parquet": FileSource("{root}/rows*.parquet", event_timestamp="at"),
    "csv": FileSource("{root}/rows*.csv", event_timestamp="at"),
    "json": FileSource("{root}/rows*.jsonl", event_timestamp="at"),
    "sql": SqlSource(url="sqlite:///{root}/rows.db", table="rows", event_timestamp="at"),
    "retired": FileSource("{root}/rows*.csv", event_timestamp="at"),
    "topic": KafkaSource("localhost:1", "rows", event_timestamp="at"),
}}
views = [
    FeatureView(
        name,
        entities=[Entity("meter", join_keys=["meter_id"])],
        source=source,
        schema=[Field("watts", "float64")],
        checks=[Range("watts", minimum=0), Unique(["meter_id"], keep="first")],
    )
    for name, source in SOURCES.items()
]
parquet, csv, json, sql, retired, topic = views
"""


def write_rows(root: Path) -> None:
    """Write five rows to two files of each format and to a table. One is negative, one repeats an earlier key."""
    rows = [(1, 1.0, AT), (2, -1.0, AT), (3, 3.0, AT), (1, 4.0, AT), (5, 5.0, AT)]
    frame = pl.DataFrame(rows, schema=["meter_id", "watts", "at"], orient="row")
    for number, part in enumerate((frame.head(3), frame.tail(2))):
        part.write_csv(root / f"rows{number}.csv")
        part.write_ndjson(root / f"rows{number}.jsonl")
        times = pl.col("at").str.to_datetime(time_unit="us", time_zone="UTC")
        part.with_columns(times).write_parquet(root / f"rows{number}.parquet")
    with sqlite3.connect(root / "rows.db") as connection:
        connection.execute("CREATE TABLE rows (meter_id INTEGER, watts REAL, at TEXT)")
        connection.executemany("INSERT INTO rows VALUES (?, ?, ?)", rows)
    connection.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchProject]:
    root = tmp_path_factory.mktemp("small")
    write_rows(root)
    with running_broker(*keys_of(*VIEWS)) as access:
        project = BatchProject(root, access, DEFINITIONS.format(root=root), module="small_batches")
        yield project
        project.close()


def batches(project: BatchProject, view: str) -> list[dict[str, Any]]:
    entries = project.ledger.entries(BatchIngested)
    return [entry.payload for entry in entries if entry.payload["view"] == view]


@pytest.mark.parametrize("view", VIEWS)
def test_small_batch_needs_no_cluster(project: BatchProject, view: str) -> None:
    """Every kind of source stores the same rows. Rules for the whole batch see all its files."""
    project.ingest(view, max_bad_share=0.5)
    [batch] = batches(project, view)
    assert (batch["rows_in"], batch["rows_stored"], batch["rows_quarantined"]) == (5, 3, 2)
    assert batch["reasons"] == {"watts outside 0..": 1, "meter_id not unique in the batch": 1}
    spec = view_spec(project.ledger, view)
    pinned = pin(target_of(f"{project.storage.root}/features/{view}", spec, project.access))
    rows = pl.concat([pinned.read(bucket, ["watts"]) for bucket in range(pinned.num_buckets)])
    stored = rows.sort("ingest_seq").select("meter_id", "watts", "ingest_seq").rows()
    assert stored == [(1, 1.0, 0), (3, 3.0, 2), (5, 5.0, 4)]
    project.ingest(view)
    assert len(batches(project, view)) == 1


def test_large_batch_attaches_to_the_cluster(project: BatchProject) -> None:
    """It is refused here, because no cluster runs."""
    with pytest.raises(ClusterNotRunning):
        project.ingest("parquet", task_values=14, source={"path": other_file(project)})


def other_file(project: BatchProject) -> str:
    """Write a file with five rows and three columns that no other test ingests, and return its path."""
    path = project.root / "other.parquet"
    rows = pl.read_parquet(project.root / "rows0.parquet")
    pl.concat([rows, rows.head(2)]).with_columns(watts=9.0).write_parquet(path)
    return str(path)


def test_refused_view_does_not_stop_the_others(
    project: BatchProject, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each refusal is printed with its view, and the command is refused after the last view."""
    done = []

    def ingest(view: str) -> None:
        done.append(view)
        if view in ("b", "c"):
            raise BatchRejected(f"{view}\nis bad")

    with pytest.raises(RefusedError, match=r"^2 of 4 views.*: b, c\.") as refused:
        for_each(["a", "b", "c", "d"], ingest)
    assert type(refused.value) is RefusedError
    assert done == ["a", "b", "c", "d"]
    assert capsys.readouterr().err.splitlines() == ["view b: refused: b is bad", "view c: refused: c is bad"]


def test_refusal_of_a_single_view_is_raised_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps its type and its message, and is not printed here."""

    def ingest(view: str) -> None:
        raise SchemaMismatch("no")

    with pytest.raises(SchemaMismatch, match=r"^no$"):
        for_each(["a"], ingest)
    assert capsys.readouterr().err == ""


def test_batch_with_too_many_bad_rows_is_refused_with_an_event(project: BatchProject) -> None:
    """The event has the number of bad rows."""
    with pytest.raises(BatchRejected, match="of 5 rows are bad"):
        project.ingest("csv", source={"path": f"{project.root}/rows*.jsonl"}, max_bad_share=0.1)
    *_, last = project.ledger.entries(BatchRefusedEvent)
    assert (last.payload["view"], last.payload["rows_bad"]) == ("csv", 2)


def test_new_column_of_tombstones_is_not_reported_as_ignored() -> None:
    """The view reads it, though it is not a field. Other new columns are ignored."""
    source = FileSource("x.parquet", event_timestamp="at", created_timestamp="known", deleted="gone")
    view = FeatureView(
        "view",
        entities=[Entity("meter", join_keys=["meter_id"])],
        source=source,
        schema=[Field("watts", "float64")],
    )
    assert describe_ignored(view, ["meter_id", "watts", "at", "known", "gone"]) == ""
    assert describe_ignored(view, ["gone", "note"]) == "; ignored, because the view does not have them: note"


ZONED = """
from feature_jobs.store import Entity, FeatureView, Field, FileSource

zoned = FeatureView(
    "zoned",
    entities=[Entity("meter", join_keys=["meter_id"])],
    source=FileSource("{root}/zoned*.csv", event_timestamp="at", zone={zone!r}),
    schema=[Field("watts", "float64")],
)
"""


def test_rows_with_moved_times_are_mended_if_they_are_a_whole_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts cannot be mended; the command says so. A part of a stored batch is not stored again beside it."""
    whole, parts = tmp_path / "zoned0.csv", tmp_path / "zoned1.csv"
    for path, meter in ((whole, 1), (parts, 2)):
        path.write_text(f"meter_id,watts,at\n{meter},1.0,2024-01-01T00:00:00\n")
    days = {"start": "2023-12-01", "end": "2024-02-01"}
    with running_broker(*keys_of("zoned")) as access:
        project = BatchProject(tmp_path, access, ZONED.format(root=tmp_path, zone=None), module="zoned")
        project.ingest("zoned", source={"path": str(whole)})
        project.ingest("zoned", source={"path": str(parts)}, **days)
        project.define(ZONED.format(root=tmp_path, zone="America/Los_Angeles"))
        with pytest.raises(SourceError, match="once without start and end"):
            project.ingest("zoned", source={"path": str(whole)}, **days)
        assert len(batches(project, "zoned")) == 2
        capsys.readouterr()
        project.ingest("zoned", source={"path": str(parts)}, **days)
        assert "because they were ingested in parts" in capsys.readouterr().out
        project.ingest("zoned", source={"path": str(whole)})
        assert "1 mended" in capsys.readouterr().out
        project.ingest("zoned", source={"path": str(whole)}, **days)
        assert "nothing to do" in capsys.readouterr().out
        project.close()


def test_all_stands_for_views_that_can_ingest_batches(project: BatchProject) -> None:
    """Views of topics and retired views are left out."""
    assert list(views_with_batches(project.module, project.ledger)) == [*VIEWS, "retired"]
    retired = FeatureViewStateChanged(view="retired", previous="active", state="retired", reason="x")
    project.ledger.append(retired, actor="test")
    assert list(views_with_batches(project.module, project.ledger)) == list(VIEWS)


def test_views_are_resolved_once_each() -> None:
    """`all` without any view is refused."""
    assert resolve_views(ALL, ["a", "b"]) == ["a", "b"]
    assert resolve_views(["b", "a", "b"], ["a"]) == ["b", "a"]
    assert resolve_views("b", ["a"]) == ["b"]
    with pytest.raises(RefusedError, match="finds no view"):
        resolve_views(ALL, [])


@pytest.mark.parametrize("setting", [5, [], [5], {"a": 1}, None])
def test_view_must_be_a_name_or_a_list_of_names(setting: Any) -> None:
    """Other values are refused when the configuration is read."""
    with pytest.raises(ValueError, match="view must be a name"):
        validate_views(setting)


def test_commands_that_need_no_ray_do_not_import_it() -> None:
    """Importing Ray takes longer than a small batch."""
    modules = [
        f"feature_jobs.{name}" for name in ("apply", "ingest", "materialize", "training_set", "replay")
    ]
    program = f"import json, sys, {', '.join(modules)}; print(json.dumps('ray' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
