"""Large batches: part files and merged buckets store the same rows as a small batch. The tasks run in this process."""

from __future__ import annotations

import pickle
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cluster.errors import BatchRejected, CommitConflict
from cluster.ledger.events import BatchIngested, BatchRefused
from cluster.security.encryption.access import protected_files
from feature_jobs import ingest
from feature_jobs.batches import spooled_pieces, spooling
from feature_jobs.batches.work import Work, _Step, pack_calls
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.ingestion import source_blocks
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import Snapshot
from tests.projects.batch import BatchProject, keys_of
from tests.projects.tables import pin, target_of
from tests.servers.key_broker import running_broker

VIEWS = ("parquet", "csv", "json", "sql", "plain")
ROWS, FILES = 1_000, 2
DEFINITIONS = """
from feature_jobs.store import Drift, Entity, FeatureView, Field, FileSource, Range, SqlSource, Unique

SOURCES = {{
    "parquet": FileSource("{root}/rows*.parquet", event_timestamp="at"),
    "csv": FileSource("{root}/rows*.csv", event_timestamp="at"),
    "json": FileSource("{root}/rows*.jsonl", event_timestamp="at"),
    "sql": SqlSource(url="sqlite:///{root}/rows.db", table="rows", event_timestamp="at"),
}}
views = [
    FeatureView(
        name,
        entities=[Entity("meter", join_keys=["meter_id"])],
        source=source,
        schema=[Field("watts", "float64"), Field("kind", "string")],
        checks=[
            Range("watts", minimum=0),
            Unique(["meter_id", "event_timestamp"], keep="first"),
            Unique(["watts", "event_timestamp"]),
            Unique(["watts", "kind"], keep="first"),
            Drift("watts"),
        ],
    )
    for name, source in SOURCES.items()
]
parquet, csv, json, sql = views
plain = FeatureView(
    "plain",
    entities=[Entity("meter", join_keys=["meter_id"])],
    source=FileSource("{root}/rows*.parquet", event_timestamp="at"),
    schema=[Field("watts", "float64"), Field("kind", "string")],
    checks=[Range("watts", minimum=0)],
)
"""
START = datetime(2024, 1, 1, tzinfo=UTC)


class LocalTasks(Work):
    """Takes every batch for a large one, and runs its tasks in this process."""

    def expect(self, values: int, *, is_large: bool = False) -> None:
        self.in_tasks = True

    def put(self, table: Any) -> Any:
        return table

    def run(self, step: Callable[..., Any], *arguments: Any, num_cpus: float = 1.0) -> Any:
        return step(*arguments)

    def run_all(self, step: Callable[..., Any], calls: Iterable[Sequence[Any]]) -> list[Any]:
        return [step(*arguments) for arguments in calls]

    def get(self, results: Sequence[Any]) -> list[Any]:
        return list(results)


def write_rows(root: Path) -> None:
    """Write the rows to two files of each format and to a table. Some are negative, and some repeat earlier ones."""
    numbers = range(ROWS)
    frame = pl.DataFrame(
        {
            "meter_id": [number % 97 for number in numbers],
            "watts": [-1.0 if number % 101 == 0 else float(number % 400) for number in numbers],
            "kind": [None if number % 7 == 0 else f"k{number % 5}" for number in numbers],
            "at": [(START + timedelta(hours=number % 300)).isoformat() for number in numbers],
        }
    )
    for number in range(FILES):
        part = frame.slice(number * ROWS // FILES, ROWS // FILES)
        part.write_csv(root / f"rows{number}.csv")
        part.write_ndjson(root / f"rows{number}.jsonl")
        times = pl.col("at").str.to_datetime(time_unit="us", time_zone="UTC")
        part.with_columns(times).write_parquet(root / f"rows{number}.parquet", row_group_size=90)
    with sqlite3.connect(root / "rows.db") as connection:
        connection.execute("CREATE TABLE rows (meter_id INTEGER, watts REAL, kind TEXT, at TEXT)")
        connection.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", frame.rows())
    connection.close()


class Projects:
    """Two projects with the same sources: one ingests them as small batches, the other one as large batches."""

    def __init__(self, root: Path, access: Any) -> None:
        definitions = DEFINITIONS.format(root=root)
        self.small, self.large = (
            BatchProject(root / name, access, definitions, module=f"large_batches_{name}")
            for name in ("small", "large")
        )

    def close(self) -> None:
        self.small.close()
        self.large.close()


@pytest.fixture
def projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Projects]:
    write_rows(tmp_path)
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    for module in (source_blocks, spooled_pieces):
        monkeypatch.setattr(module, "PIECE_VALUES", 400)
    with running_broker(*keys_of(*VIEWS)) as access:
        opened = Projects(tmp_path, access)
        yield opened
        opened.close()


def ingest_large(project: BatchProject, monkeypatch: pytest.MonkeyPatch, view: str, **given: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "Work", LocalTasks)
        project.ingest(view, **given)


def snapshot(project: BatchProject, view: str) -> Snapshot:
    spec = view_spec(project.ledger, view)
    return pin(target_of(f"{project.storage.root}/features/{view}", spec, project.access))


def content(project: BatchProject, view: str) -> pl.DataFrame:
    """Return all stored rows by bucket, in the order of `ingest_seq`."""
    pinned = snapshot(project, view)
    names = ["watts", "kind"]
    frames = [
        pinned.read(bucket, names).with_columns(bucket=pl.lit(bucket)) for bucket in range(pinned.num_buckets)
    ]
    return pl.concat(frames).sort("ingest_seq")


def events(project: BatchProject, view: str) -> list[dict[str, Any]]:
    """Return the events of a view's batches."""
    return [entry.payload for entry in project.ledger.entries(BatchIngested) if entry.payload["view"] == view]


def quarantine(project: BatchProject, view: str, batch: str) -> list[dict[str, Any]]:
    path = f"{project.storage.root}/quarantine/{view}/{batch}"
    rows = protected_files(project.access).read(path).drop_columns(["ingested_at"])
    return sorted(rows.to_pylist(), key=lambda row: row["ingest_seq"])


def parts(project: BatchProject) -> list[Path]:
    return list(Path(project.storage.root).glob("features/*/bucket=*/part-*"))


def files_on_disk(project: BatchProject) -> set[Path]:
    return set(Path(project.storage.root).glob("features/*/bucket=*/*.parquet"))


@pytest.mark.parametrize("view", VIEWS)
def test_large_batch_is_stored_like_a_small_one(
    projects: Projects, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    """Rows, their numbers and buckets, the quarantine and the events are equal. Each bucket has one sorted file."""
    projects.small.ingest(view, max_bad_share=1.0)
    ingest_large(projects.large, monkeypatch, view, max_bad_share=1.0)
    assert content(projects.large, view).equals(content(projects.small, view))
    [small], [large] = events(projects.small, view), events(projects.large, view)
    assert large == small
    assert small["rows_quarantined"] > 0
    batches = (small["quarantine"], large["quarantine"])
    assert quarantine(projects.large, view, batches[1]) == quarantine(projects.small, view, batches[0])
    pinned = snapshot(projects.large, view)
    assert [file.bucket for file in pinned.files] == list(range(pinned.num_buckets))
    for bucket in range(pinned.num_buckets):
        assert pinned.read(bucket, [])["event_timestamp"].is_sorted()
    assert parts(projects.large) == []


@pytest.mark.parametrize("view", ["plain", "parquet"])
def test_chunks_of_a_range_are_stored_like_small_ones(
    projects: Projects, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    """The source is read once. Each chunk is a batch with its own sequence numbers and its own `Unique` rules."""
    options: dict[str, Any] = {
        "start": "2024-01-02",
        "end": "2024-01-09",
        "chunk": "2d",
        "max_bad_share": 1.0,
    }
    projects.small.ingest(view, **options)
    ingest_large(projects.large, monkeypatch, view, **options)
    assert content(projects.large, view).equals(content(projects.small, view))
    assert events(projects.large, view) == events(projects.small, view)
    assert len(events(projects.large, view)) == 4
    assert parts(projects.large) == []


def test_next_large_batch_is_compared_with_the_profile(
    projects: Projects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profile has all distributions, so a drift of the next batch is found, and the batch leaves no part."""
    ingest_large(projects.large, monkeypatch, "parquet", max_bad_share=1.0)
    other = projects.large.root / "other.parquet"
    rows = pl.read_parquet(projects.large.root.parent / "rows0.parquet")
    later = rows.with_columns(pl.col("watts") + 1e6, pl.col("at") + timedelta(days=90))
    later.unique(["meter_id", "at"]).unique(["watts", "at"]).write_parquet(other)
    before = content(projects.large, "parquet")
    with pytest.raises(BatchRejected, match="watts"):
        ingest_large(projects.large, monkeypatch, "parquet", source={"path": str(other)}, max_bad_share=1.0)
    [refused] = projects.large.ledger.entries(BatchRefused)
    assert refused.payload["findings"]
    assert content(projects.large, "parquet").equals(before)
    assert parts(projects.large) == []


def test_failed_task_leaves_no_part(projects: Projects, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of earlier tasks are removed when the command ends with an error."""

    def fail(*_: object) -> None:
        assert parts(projects.large)
        raise RuntimeError("disk full")

    monkeypatch.setattr(spooling, "_merge", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        ingest_large(projects.large, monkeypatch, "plain", max_bad_share=1.0)
    assert parts(projects.large) == []
    assert events(projects.large, "plain") == []


def test_batch_conflicts_with_a_rebucketing(projects: Projects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts are in the old buckets, so nothing is stored, and the command has to run again."""
    monkeypatch.setattr(offline, "num_buckets", lambda _: 64)
    with pytest.raises(CommitConflict, match="rebucketed"):
        ingest_large(projects.large, monkeypatch, "plain", max_bad_share=1.0)
    assert parts(projects.large) == []


def test_bad_rows_of_a_refused_batch_are_only_counted(
    projects: Projects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver holds no bad rows of a batch that has too many. The refusal states their number."""
    kept: list[int] = []
    real = spooling._CollectedBatch.add

    def add(batch: Any, piece: Any) -> None:
        real(batch, piece)
        kept.append(sum(each.bad.num_rows for each in batch.pieces if each.bad is not None))

    monkeypatch.setattr(spooling._CollectedBatch, "add", add)
    with pytest.raises(BatchRejected, match="are bad"):
        projects.small.ingest("parquet", max_bad_share=0.02)
    with pytest.raises(BatchRejected, match="are bad"):
        ingest_large(projects.large, monkeypatch, "parquet", max_bad_share=0.02)
    refused = [
        [entry.payload for entry in project.ledger.entries(BatchRefused)]
        for project in (projects.small, projects.large)
    ]
    assert refused[0] == refused[1]
    assert max(kept) <= 0.02 * ROWS
    assert kept[-1] == 0


def test_as_many_bad_rows_as_allowed_are_stored(projects: Projects, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.29 of 100 rows are 28.999999999999996 in floating point, but 29 bad rows are allowed."""
    path = projects.large.root.parent / "hundred.parquet"
    rows = pl.read_parquet(projects.large.root.parent / "rows0.parquet").head(100)
    bad = pl.int_range(100) < 29
    rows.with_columns(watts=pl.when(bad).then(-1.0).otherwise(1.0)).write_parquet(path, row_group_size=20)
    ingest_large(projects.large, monkeypatch, "plain", source={"path": str(path)}, max_bad_share=0.29)
    [event] = events(projects.large, "plain")
    assert (event["rows_stored"], event["rows_quarantined"]) == (71, 29)


def test_chunks_of_a_piece_share_the_memory(projects: Projects, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task writes part files when all its chunks together have enough rows."""
    pending: list[int] = []
    real = spooled_pieces.spool_piece

    def spool_piece(*arguments: Any) -> Any:
        pending.append(0)
        return real(*arguments)

    finish = spooled_pieces._PartWriter.finish

    def counted(writer: Any) -> Any:
        pending[-1] += writer.num_pending
        return finish(writer)

    monkeypatch.setattr(spooling, "spool_piece", spool_piece)
    monkeypatch.setattr(spooled_pieces._PartWriter, "finish", counted)
    options: dict[str, Any] = {
        "start": "2024-01-01",
        "end": "2024-01-20",
        "chunk": "1d",
        "max_bad_share": 1.0,
    }
    ingest_large(projects.large, monkeypatch, "csv", **options)
    assert len(pending) == FILES
    assert max(pending) < spooled_pieces.PIECE_VALUES


def test_conflict_leaves_no_merged_file(projects: Projects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job commits while the buckets are merged. The files of the batch are removed, those of the table stay."""
    ingest_large(projects.large, monkeypatch, "plain", max_bad_share=1.0)
    before = files_on_disk(projects.large)

    def conflict(*_: object, **__: object) -> int:
        assert files_on_disk(projects.large) > before
        raise CommitConflict("another job committed")

    monkeypatch.setattr(offline, "commit", conflict)
    source = {"path": str(projects.large.root.parent / "rows0.parquet")}
    with pytest.raises(CommitConflict, match="another job"):
        ingest_large(projects.large, monkeypatch, "plain", source=source, max_bad_share=1.0)
    assert files_on_disk(projects.large) == before


def test_a_task_receives_only_the_arguments_of_its_call() -> None:
    """Arguments are packed by call, so a task's function does not grow with the number of calls."""
    packed = pack_calls([number, "x" * 1_000] for number in range(50))
    assert [pickle.loads(call)[0] for call in packed.calls] == list(range(50))  # noqa: S301 (own data)
    step = _Step(len, packed.references)
    assert len(pickle.dumps(step)) < 1_000
    [result] = _Step(divmod, []).run({"call": [pack_calls([[7, 2]]).calls[0]]})["result"]
    assert pickle.loads(result) == (3, 1)  # noqa: S301 (own data)
