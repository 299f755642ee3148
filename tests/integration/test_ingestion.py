"""Tests of ingestion on a cluster.

Bad rows go to quarantine, a bad batch is refused as a whole, and a batch is never stored twice. Tests with
`task_values=0` use Ray tasks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from deltalake import DeltaTable

from cluster.ledger.events import BatchIngested, BatchRefused, FeatureTableRewritten, QuarantineReplayed

if TYPE_CHECKING:
    from tests.integration.conftest import Project

DEFINITIONS = """
from dataclasses import replace
from feature_jobs.store import Drift, Entity, FeatureView, Field, FileSource, Outlier, Range, RowCount, Unique

meter = Entity("meter", join_keys=["meter_id"])
reading = FeatureView(
    "reading",
    entities=[meter],
    source=FileSource("reading.parquet", event_timestamp="at"),
    schema=[Field("watts", "float64")],
    checks=[Range("watts", minimum=0)],
)
flow = FeatureView(
    "flow",
    entities=[meter],
    source=FileSource("flow.parquet", event_timestamp="at"),
    schema=[Field("watts", "float64")],
    checks=[
        Range("watts", minimum=0),
        Unique(["meter_id", "event_timestamp"], keep="first"),
        Outlier("watts"),
        RowCount(3.0),
        Drift("watts"),
    ],
)
"""
INGEST = ("definitions=meters", "view=reading")
IN_TASKS = "task_values=0"


@pytest.fixture(scope="module")
def project(falaj_cluster: Project) -> Project:
    """Return the project after the meters' definitions are applied."""
    (falaj_cluster.root / "meters.py").write_text(DEFINITIONS)
    falaj_cluster.run("feature_jobs.apply", "definitions=meters", check=True)
    return falaj_cluster


def write(root: Path, name: str, watts: list[Any], meters: list[int] | None = None) -> str:
    keys = list(range(len(watts))) if meters is None else meters
    frame = pl.DataFrame({"meter_id": keys, "watts": watts, "at": ["2024-01-01T00:00:00"] * len(watts)})
    frame.with_columns(pl.col("at").str.to_datetime(time_unit="us", time_zone="UTC")).write_parquet(
        root / name
    )
    return f"source.path={name}"


def stored(project: Project) -> pl.DataFrame:
    """Return the public columns of the stored rows, as any Delta reader sees them."""
    return pl.scan_delta(str(project.storage_root / "features" / "reading")).select("ingest_seq").collect()


def test_rows_in_are_rows_stored_plus_rows_quarantined(project: Project) -> None:
    """A bad row goes to quarantine with the reason and its source values. A second run changes nothing.

    This test uses Ray tasks. The command prints only the result and the duration.
    """
    source = write(project.root, "mixed.parquet", [1.0, -1.0] + [2.0] * 98)
    done = project.run("feature_jobs.ingest", *INGEST, source, IN_TASKS, check=True)
    assert done.stdout == "view reading: 100 rows in = 99 stored + 1 quarantined, table version 1\n"
    assert re.fullmatch(r"done in \d+\.\d s\n", done.stderr)
    again = project.run("feature_jobs.ingest", *INGEST, source, check=True)
    [entry] = (one for one in project.ledger().entries(BatchIngested) if one.payload["view"] == "reading")
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
    """No row of a bad batch is stored, and the ledger records the reason."""
    before = stored(project).height
    result = project.run("feature_jobs.ingest", *INGEST, write(project.root, "bad.parquet", watts))
    assert result.returncode == 2
    assert said in result.stderr
    *_, last = project.ledger().entries(BatchRefused)
    assert said in last.payload["reason"]
    assert stored(project).height == before


def test_a_commit_without_its_event_is_found_again(project: Project) -> None:
    """After a crash between the table's commit and the ledger event, the next run writes the event.

    It stores no row again.
    """
    source = write(project.root, "killed.parquet", [3.0] * 20)
    project.run("feature_jobs.ingest", *INGEST, source, check=True)
    table = project.storage_root / "features" / "reading"
    version, rows = DeltaTable(str(table)).version(), stored(project).height
    with project.ledger().writing() as connection:
        last_batch = "SELECT max(seq) FROM events WHERE type = 'BatchIngested'"
        connection.exec_driver_sql(f"DELETE FROM events WHERE seq >= ({last_batch})")
    project.run("feature_jobs.ingest", *INGEST, source, check=True)
    *_, last = project.ledger().entries(BatchIngested)
    assert (last.payload["rows_stored"], last.payload["table_version"]) == (20, version)
    assert (DeltaTable(str(table)).version(), stored(project).height) == (version, rows)


def test_a_batch_is_held_against_the_last_good_one(project: Project) -> None:
    """A batch is compared with the last good batch.

    Duplicate rows and outliers go to quarantine. A batch with a different distribution is refused, and the
    message shows the rules' figures.
    """
    flow = ("definitions=meters", "view=flow")
    spread = [float(number) for number in range(100)]
    first = write(project.root, "flow-1.parquet", [*spread, 7.0], [*range(100), 99])
    second = write(project.root, "flow-2.parquet", [*spread, 1e6])
    moved = write(project.root, "flow-3.parquet", [number + 60 for number in spread] * 4)
    project.run("feature_jobs.ingest", *flow, first, IN_TASKS, check=True)
    project.run("feature_jobs.ingest", *flow, second, check=True)
    refused = project.run("feature_jobs.ingest", *flow, moved)
    assert refused.returncode == 2, refused.stderr
    assert "more than a factor of 3" in refused.stderr
    assert "stability index of 'watts'" in refused.stderr
    *_, event = project.ledger().entries(BatchRefused)
    assert [found["rule"] for found in event.payload["findings"]] == ["RowCount", "Drift(watts)"]
    assert event.payload["findings"][0]["value"] == pytest.approx(400 / 101)
    project.run("feature_jobs.ingest", *flow, moved, "batch_rules=report", check=True)
    batches = [
        entry.payload for entry in project.ledger().entries(BatchIngested) if entry.payload["view"] == "flow"
    ]
    assert [batch["reasons"] for batch in batches] == [
        {"meter_id, event_timestamp not unique in the batch": 1},
        {"watts more than 3 interquartile ranges outside the last good batch": 1},
        {},
    ]
    assert [len(batch["findings"]) for batch in batches] == [0, 0, 2]
    assert batches[0]["profile"] == {"rows_in": 101, "rows": 100, "nulls": {"watts": 0}}


def test_several_views_are_one_command(project: Project) -> None:
    """One command ingests several views.

    One view is refused, so the exit code is 2 and the command names the view; the other view is stored. One
    command then materialises several views.
    """
    first = DEFINITIONS.split("flow =")[0].replace("reading", "inflow")
    (project.root / "several.py").write_text(
        first
        + 'outflow = replace(inflow, name="outflow", source=FileSource("none.parquet", event_timestamp="at"))'
    )
    project.run("feature_jobs.apply", "definitions=several", check=True)
    write(project.root, "inflow.parquet", [1.0])
    done = project.run("feature_jobs.ingest", "definitions=several", "view=all")
    assert done.returncode == 2
    assert "view inflow: 1 rows in = 1 stored" in done.stdout
    assert "view outflow: refused: No Parquet file" in done.stderr
    assert "refused: 1 of 2 views, for the reasons above: outflow." in done.stderr
    online = project.run("feature_jobs.materialize", "view=[inflow,reading]", check=True).stdout
    assert "view inflow: 1 entities online" in online
    assert "view reading: " in online


def test_a_source_that_is_damaged_in_its_middle_is_refused(project: Project) -> None:
    """A file that is damaged in the middle is refused without a crash.

    Its footer and first rows are intact, so only a worker detects the damage.
    """
    frame = pl.DataFrame({"meter_id": range(300_000), "watts": [float(n) for n in range(300_000)]})
    at = pl.lit("2024-01-01").str.to_datetime(time_unit="us", time_zone="UTC")
    path = project.root / "damaged.parquet"
    frame.with_columns(at=at).write_parquet(path, row_group_size=50_000, compression="zstd")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200_000] = b"\xff" * 200_000
    path.write_bytes(content)
    before = stored(project).height
    result = project.run("feature_jobs.ingest", *INGEST, "source.path=damaged.parquet", IN_TASKS)
    assert result.returncode == 2, result.stderr
    assert "damaged.parquet cannot be read" in result.stderr
    assert stored(project).height == before


def test_a_new_column_of_the_source_is_reported(project: Project) -> None:
    """A new column of the source is ignored and reported.

    It is reported only for the first batch that has it.
    """
    project.run("feature_jobs.ingest", *INGEST, write(project.root, "before.parquet", [5.0]), check=True)
    wider = pl.read_parquet(project.root / "before.parquet").with_columns(note=pl.lit("x"))
    wider.write_parquet(project.root / "wider.parquet")
    said = project.run("feature_jobs.ingest", *INGEST, "source.path=wider.parquet", check=True).stdout
    assert "new in the source: note; ignored" in said
    *_, last = project.ledger().entries(BatchIngested)
    assert last.payload["new_columns"] == ["note"]


def test_quarantined_rows_are_replayed_after_a_fix(project: Project) -> None:
    """After a rule is widened, a replay stores each row that now passes, once.

    Rows that still fail stay in quarantine. The commands print both counts.
    """
    view = ("definitions=quarantined", "view=tank")
    text = DEFINITIONS.replace("reading", "tank").split("flow =")[0]
    definitions = project.root / "quarantined.py"
    definitions.write_text(text)
    project.run("feature_jobs.apply", "definitions=quarantined", check=True)
    source = write(project.root, "tank.parquet", [-1.0, -5.0] + [2.0] * 98)
    project.run("feature_jobs.ingest", *view, source, check=True)
    listed = project.run("feature_jobs.quarantine", "view=tank", "rows=1", check=True).stdout
    assert "2 rows in quarantine, of 1 batches" in listed
    assert "2 watts outside 0.." in listed
    assert '"watts": -1.0' in listed
    definitions.write_text(text.replace("minimum=0", "minimum=-2"))
    project.run("feature_jobs.apply", "definitions=quarantined", check=True)
    replayed = project.run("feature_jobs.replay", *view, check=True).stdout
    assert "2 rows in quarantine = 1 stored + 1 still bad" in replayed
    again = project.run("feature_jobs.replay", *view, check=True).stdout
    assert "1 rows in quarantine = 0 stored + 1 still bad" in again
    assert "1 watts outside -2.." in project.run("feature_jobs.quarantine", "view=tank", check=True).stdout
    tank = pl.scan_delta(str(project.storage_root / "features" / "tank")).select("ingest_seq").collect()
    assert tank.height == 99
    [event] = project.ledger().entries(QuarantineReplayed)
    assert (event.payload["rows_in"], event.payload["rows_stored"], event.payload["rows_quarantined"]) == (
        2,
        1,
        1,
    )


def test_table_is_bucketed_anew_in_tasks(project: Project) -> None:
    """The table keeps its rows, the ledger has an event, and the next batch goes to the new buckets."""
    before = stored(project)["ingest_seq"].sort()
    done = project.run("feature_jobs.rebucket", "view=reading", "buckets=16", IN_TASKS, check=True)
    assert "16 buckets instead of 8" in done.stdout
    assert stored(project)["ingest_seq"].sort().equals(before)
    *_, event = project.ledger().entries(FeatureTableRewritten)
    assert (event.payload["view"], event.payload["num_buckets"]) == ("reading", 16)
    source = write(project.root, "after.parquet", [5.0] * 200)
    project.run("feature_jobs.ingest", *INGEST, source, IN_TASKS, check=True)
    paths = DeltaTable(str(project.storage_root / "features" / "reading")).file_uris()
    assert max(int(path.split("bucket=")[1].split("/")[0]) for path in paths) == 15
    assert stored(project).height == before.len() + 200
