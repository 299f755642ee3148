"""Tests of one batch from each kind of source, through the whole of ingestion."""

from __future__ import annotations

import datetime as dt
import sqlite3
import subprocess
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest

from cluster.ledger.events import BatchIngested

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource, Range, SqlSource

meter = Entity("gauge", join_keys=["gauge_id"])
SOURCES = {
    "csv": FileSource("gauges*.csv", event_timestamp="at"),
    "json": FileSource("gauges.jsonl", event_timestamp="at"),
    "sql": SqlSource(url_env="GAUGES", table="gauges", event_timestamp="at"),
}
views = [
    FeatureView(
        f"gauge_{kind}",
        entities=[meter],
        source=source,
        schema=[Field("watts", "float64"), Field("place", "string")],
        checks=[Range("watts", minimum=0)],
    )
    for kind, source in SOURCES.items()
]
days = FeatureView(
    "gauge_days",
    entities=[meter],
    source=FileSource("gauge_days", event_timestamp="at"),
    schema=[
        Field("dt", "date"), Field("wave", "list<float32, 3>"), Field("price", "decimal(8, 2)"), Field("raw", "bytes")
    ],
)
gauge_days = FeatureService("gauge_days", views=[days])
gauges = FeatureService("gauges", views=views)
"""
ROWS = 100
AT = "2024-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def project(falaj_cluster: Project) -> Project:
    """Write the same hundred rows as two CSV files, as JSON lines and as a table. One of the rows is bad."""
    root = falaj_cluster.root
    (root / "gauges_defs.py").write_text(DEFINITIONS)
    rows = [(n, -1.0 if n == 7 else n / 4, f"room, {n}", AT) for n in range(ROWS)]
    frame = pl.DataFrame(rows, schema=["gauge_id", "watts", "place", "at"], orient="row")
    frame.head(60).write_csv(root / "gauges_1.csv")
    frame.tail(40).write_csv(root / "gauges_2.csv")
    frame.write_ndjson(root / "gauges.jsonl")
    with sqlite3.connect(root / "gauges.db") as connection:
        connection.execute("CREATE TABLE gauges (gauge_id INTEGER, watts REAL, place TEXT, at TEXT)")
        connection.executemany("INSERT INTO gauges VALUES (?, ?, ?, ?)", rows)
    connection.close()
    people = frame.select(
        "gauge_id", event_timestamp=pl.lit(AT).str.to_datetime(time_unit="us", time_zone="UTC")
    )
    people.write_parquet(root / "gauges_asked.parquet")
    falaj_cluster.run("feature_jobs.apply", "definitions=gauges_defs", check=True)
    return falaj_cluster


def test_every_kind_of_source_gives_the_same_features(project: Project) -> None:
    """For each source, rows in = stored + quarantined. The same content is ingested only once."""
    for kind in ("csv", "json", "sql"):
        command = ("feature_jobs.ingest", "definitions=gauges_defs", f"view=gauge_{kind}")
        project.run(*command, check=True, GAUGES="sqlite:///gauges.db")
        assert "already" in project.run(*command, check=True, GAUGES="sqlite:///gauges.db").stdout
    batches = [entry.payload for entry in project.ledger().entries(BatchIngested)]
    counts = {
        batch["view"]: (batch["rows_in"], batch["rows_stored"], batch["rows_quarantined"])
        for batch in batches
    }
    ours = {f"gauge_{kind}": (ROWS, ROWS - 1, 1) for kind in ("csv", "json", "sql")}
    assert counts.items() >= ours.items()
    arguments = ("service=gauges", "entities=gauges_asked.parquet", "output=gauges_out.parquet")
    project.run("feature_jobs.training_set", "definitions=gauges_defs", *arguments, check=True)
    table = pl.read_parquet(project.root / "gauges_out.parquet")
    expected = [None if n == 7 else n / 4 for n in range(ROWS)]
    for kind in ("csv", "json", "sql"):
        assert table[f"gauge_{kind}__watts"].to_list() == expected
        assert table[f"gauge_{kind}__place"][1] == "room, 1"


def test_partition_folders_with_lists_and_decimals_go_through_ingestion(project: Project) -> None:
    """Partition folders become columns, and equal files of two days are stored as rows of two batches.

    A list of the wrong length goes to quarantine.
    """
    day = pl.DataFrame(
        {"gauge_id": [1, 2, 3], "wave": [[0.5, 1.0, 2.0], [0.5], None], "raw": [b"a", b"b", None]},
        schema_overrides={"wave": pl.List(pl.Float32)},
    ).with_columns(
        price=pl.lit("1.50").cast(pl.Decimal(10, 2)), at=pl.lit(AT).str.to_datetime(time_zone="UTC")
    )
    for name in ("2024-01-02", "2024-01-03"):
        folder = project.root / "gauge_days" / f"dt={name}"
        folder.mkdir(parents=True)
        day.write_parquet(folder / "x.parquet")
    command = ("feature_jobs.ingest", "definitions=gauges_defs", "view=gauge_days", "max_bad_share=0.5")
    for name in ("2024-01-02", "2024-01-03"):
        said = project.run(*command, f"source.path='gauge_days/dt={name}'", check=True).stdout
        assert "3 rows in = 2 stored + 1 quarantined" in said
    arguments = ("service=gauge_days", "entities=gauges_asked.parquet", "output=gauge_days_out.parquet")
    project.run("feature_jobs.training_set", "definitions=gauges_defs", *arguments, check=True)
    rows = pl.read_parquet(project.root / "gauge_days_out.parquet").filter(
        pl.col("gauge_id").is_in([1, 2, 3])
    )
    assert rows["gauge_days__dt"].to_list() == [dt.date(2024, 1, 3), None, dt.date(2024, 1, 3)]
    assert rows["gauge_days__wave"].to_list() == [[0.5, 1.0, 2.0], None, None]
    assert rows["gauge_days__price"].to_list() == [Decimal("1.50"), None, Decimal("1.50")]
    assert rows["gauge_days__raw"].to_list() == [b"a", None, None]


def test_source_that_does_not_fit_is_refused(project: Project) -> None:
    """A text in a number column far from the first rows is refused. A missing database URL is refused too."""
    lines = [f"{n},{n},a,{AT}" for n in range(3000)] + [f"3000,many,a,{AT}"]
    (project.root / "bad.csv").write_text("\n".join(["gauge_id,watts,place,at", *lines]))
    command = ("feature_jobs.ingest", "definitions=gauges_defs")
    bad = project.run(*command, "view=gauge_csv", "source.path=bad.csv")
    assert (bad.returncode, "Column 'watts' should be float64" in bad.stderr) == (2, True), bad.stderr
    missing = project.run(*command, "view=gauge_sql")
    assert (missing.returncode, "GAUGES" in missing.stderr) == (2, True), missing.stderr


def test_hour_without_events_is_a_batch_without_rows(project: Project) -> None:
    """Files without rows give a batch of zero rows, exit code 0 and an event, each time.

    A column that is missing in one of several files is refused.
    """
    folder = project.root / "hours"
    folder.mkdir()
    for name in ("1.csv", "2.csv"):
        (folder / name).write_text("gauge_id,watts,place,at\n")
    command = ("feature_jobs.ingest", "definitions=gauges_defs", "view=gauge_csv", "source.path=hours/*.csv")
    for _ in range(2):
        assert "0 rows in = 0 stored" in project.run(*command, check=True).stdout
    (folder / "2.csv").write_text(f"gauge_id,watts,at\n1,1,{AT}\n")
    refused = project.run(*command)
    assert (refused.returncode, "2.csv: Column 'place'" in refused.stderr) == (2, True), refused.stderr
    ledger = project.ledger()
    hours = [
        entry.payload for entry in ledger.entries(BatchIngested) if entry.payload["source"] == "1.csv, 2.csv"
    ]
    assert [(one["rows_in"], one["source_columns"]) for one in hours] == [
        (0, ["gauge_id", "watts", "place", "at"])
    ] * 2


def test_source_is_ingested_again_where_it_is_asked_for(project: Project) -> None:
    """With `again=true`, each row is kept as it is, or corrected. A correct table gets no new version."""
    command = ("feature_jobs.ingest", "definitions=gauges_defs", "view=gauge_csv")
    said = project.run(*command, "again=true", check=True, GAUGES="sqlite:///gauges.db").stdout
    assert f"{ROWS} rows in = {ROWS - 1} unchanged + 0 mended + 0 added + 1 quarantined" in said
    assert "the table is unchanged" in said
    zoned = (
        (project.root / "gauges_defs.py")
        .read_text()
        .replace('*.csv", event', '*.csv", zone="Asia/Dubai", event')
    )
    (project.root / "gauges_defs.py").write_text(zoned)
    changed = project.run("feature_jobs.apply", "definitions=gauges_defs", check=True).stdout
    assert "source.zone" in changed
    said = project.run(*command, check=True).stdout
    assert f"{ROWS - 1} unchanged + 0 mended" in said  # the file's times have their own zone
    assert "already" in project.run(*command, check=True).stdout


def test_backfill_that_is_killed_goes_on_where_it_was(project: Project) -> None:
    """A backfill that is killed between two chunks continues on the next run.

    The next run stores the remaining chunks, and every row is stored once.
    """
    days = [dt.datetime(2024, 1, 1 + n, tzinfo=dt.UTC) for n in range(10)]
    frame = pl.DataFrame({"gauge_id": range(10), "watts": [1.0] * 10, "place": ["x"] * 10, "at": days})
    frame.write_parquet(project.root / "old.parquet")
    command = (
        "feature_jobs.ingest",
        "definitions=gauges_defs",
        "view=gauge_json",
        "source.path=old.parquet",
        "start=2024-01-02",
        "end=2024-01-10",
        "chunk=1d",
    )
    running = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=project.root, env=project.env, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert "1 rows in" in running.stdout.readline()
    running.kill()
    running.wait()
    done = len(chunks_of(project))
    assert 1 <= done < 8
    said = project.run(*command, check=True).stdout
    assert said.count("1 rows in = 1 stored") == 8 - done
    assert "already" in project.run(*command[:-1], check=True).stdout
    chunks = chunks_of(project)
    assert [chunk["start"][:10] for chunk in chunks] == [f"2024-01-{n:02}" for n in range(2, 10)]
    assert {(chunk["rows_in"], chunk["rows_stored"]) for chunk in chunks} == {(1, 1)}


def chunks_of(project: Project) -> list[dict[str, Any]]:
    """Return the ledger's entries of the backfill."""
    return [entry.payload for entry in project.ledger().entries(BatchIngested) if entry.payload["start"]]
