"""Feature tables: every Delta reader sees a commit as a whole, once, and at every later version."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from cluster.errors import SchemaMismatch, SourceError, TrainingSetError
from cluster.security.encryption.parquet import ProtectedFileCorrupt, Protection
from cluster.security.keys.access import KeyAccess
from feature_jobs.store.catalog.protection import view_protection
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import BucketFile, Snapshot, Target
from tests.projects.tables import TIMES, batch_of, commit_rows, pin
from tests.projects.views import make_spec

START = datetime(2024, 1, 1, tzinfo=UTC)
BASE = [("person_id", pa.int64()), ("amount", pa.float64())]
SCHEMA = pa.schema([*BASE, *TIMES])


def rows(first: int, count: int, *, schema: pa.Schema = SCHEMA, **columns: Any) -> pa.Table:
    """Return rows of `count` persons, numbered from `first`. A greater number has an earlier event."""
    numbers = range(first, first + count)
    event = [START - timedelta(hours=number) for number in numbers]
    values = {
        "person_id": list(numbers),
        "amount": [float(number) for number in numbers],
        "event_timestamp": event,
        "created_timestamp": event,
        "ingested_at": [START] * count,
        "ingest_seq": list(numbers),
    }
    return pa.table({name: (values | columns)[name] for name in schema.names}, schema=schema)


PUBLIC = Protection(
    default="features/income/internal", keys=tuple((name, None) for name in (*SCHEMA.names, "sector"))
)
"""So that foreign readers see everything; `test_reader_without_keys_reads_public_columns_only` has another."""


TOMBSTONES = Protection(default=PUBLIC.default, keys=(*PUBLIC.keys, ("deleted", None)))


def target(uri: str, access: KeyAccess, protection: Protection = PUBLIC) -> Target:
    return Target(uri=uri, keys=("person_id",), buckets=4, protection=protection, access=access)


def write(uri: str, table: pa.Table, name: str, access: KeyAccess) -> list[BucketFile]:
    """Write bucket files without a commit."""
    return offline.write_files(table, target(uri, access), name=name)


def ingest(
    uri: str, table: pa.Table, ingest_id: str, access: KeyAccess, protection: Protection = PUBLIC
) -> int:
    """Ingest rows without Ray and return the table version."""
    return commit_rows(target(uri, access, protection), table, ingest_id=ingest_id)


def newest(
    uri: str, access: KeyAccess, *, protection: Protection = PUBLIC, version: int | None = None
) -> Snapshot:
    """Return the newest snapshot of the table."""
    return pin(target(uri, access, protection), version=version)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"{tmp_path}/features/income"


def test_foreign_delta_reader_sees_the_committed_rows(uri: str, access: KeyAccess) -> None:
    """Polars reads the written rows as a plain Delta table."""
    ingest(uri, rows(0, 50), "a", access)
    ingest(uri, rows(50, 50), "b", access)
    actual = pl.scan_delta(uri).collect().sort("person_id")
    expected = pl.DataFrame(pl.from_arrow(rows(0, 100)))
    assert expected.equals(actual.select(expected.columns))
    assert {0, 1, 2, 3} == set(actual["bucket"])


def test_each_row_is_in_one_bucket_sorted_by_availability(uri: str, access: KeyAccess) -> None:
    """The buckets together have every row exactly once. Files are sorted, so that a bucket only has to be merged."""
    ingest(uri, rows(0, 50), "a", access)
    pinned = newest(uri, access)
    for file in pinned.files:
        assert pl.read_parquet(f"{uri}/{file.path}")["event_timestamp"].is_sorted()
    frame = pl.concat(pinned.read(bucket, ["amount"]) for bucket in range(pinned.num_buckets))
    assert list(range(50)) == sorted(frame["person_id"])
    assert pinned.rows == 50


def test_files_without_a_commit_are_not_read(uri: str, access: KeyAccess) -> None:
    """After a crash before the commit the table is unchanged."""
    ingest(uri, rows(0, 10), "a", access)
    write(uri, rows(10, 10), "crashed", access)
    assert newest(uri, access).rows == 10
    assert pl.scan_delta(uri).select(pl.len()).collect().item() == 10


def test_commit_without_ledger_event_is_found_by_its_id(uri: str, access: KeyAccess) -> None:
    """After a crash before the ledger event, the batch is found in the table's history."""
    ingest(uri, rows(0, 10), "a", access)
    version = ingest(uri, rows(10, 7), "b", access)
    ingest(uri, rows(17, 5), "c", access)
    table = DeltaTable(uri)
    assert (batch_of("b", 7), version) == offline.find_committed_batch(table, "b")
    assert offline.find_committed_batch(table, "never") is None


def test_second_of_two_concurrent_commits_is_refused(uri: str, access: KeyAccess) -> None:
    """Two ingestions used the same sequence numbers, so only one may commit."""
    ingest(uri, rows(0, 10), "a", access)
    table, other = DeltaTable(uri), DeltaTable(uri)
    offline.commit(other, SCHEMA, write(uri, rows(10, 5), "b", access), batch_of("b", 5), seq=14)
    with pytest.raises(SourceError, match="Another job committed"):
        offline.commit(table, SCHEMA, write(uri, rows(10, 5), "c", access), batch_of("c", 5), seq=14)
    assert newest(uri, access).rows == 15


def test_sequence_numbers_continue_after_the_last_batch(uri: str, access: KeyAccess) -> None:
    """A later batch has greater sequence numbers."""
    assert offline.last_seq(offline.create_table(uri, SCHEMA, num_buckets=4)) == -1
    ingest(uri, rows(0, 10), "a", access)
    assert offline.last_seq(DeltaTable(uri)) == 9


def test_new_feature_is_null_in_older_rows(uri: str, access: KeyAccess) -> None:
    """A feature that is added to a view is null in older rows."""
    ingest(uri, rows(0, 5), "a", access)
    wider = pa.schema([*BASE, ("sector", pa.string()), *TIMES])
    ingest(uri, rows(5, 5, schema=wider, sector=["x"] * 5), "b", access)
    pinned = newest(uri, access)
    parts = [pinned.read(bucket, ["sector"]) for bucket in range(4)]
    frame = pl.concat(parts, how="vertical_relaxed").sort("person_id")
    assert frame["sector"].to_list() == [None] * 5 + ["x"] * 5
    assert pl.read_delta(uri).sort("person_id")["sector"].to_list() == [None] * 5 + ["x"] * 5


def test_rows_from_before_tombstones_are_not_deleted(uri: str, access: KeyAccess) -> None:
    """Rows that are older than the column `deleted` are read as not deleted."""
    ingest(uri, rows(0, 5), "a", access, TOMBSTONES)
    assert "deleted" not in newest(uri, access, protection=TOMBSTONES).read(0, []).columns
    marked = pa.schema([*BASE, ("deleted", pa.bool_()), *TIMES])
    ingest(uri, rows(5, 2, schema=marked, deleted=[True, False]), "b", access, TOMBSTONES)
    pinned = newest(uri, access, protection=TOMBSTONES)
    frame = pl.concat([pinned.read(bucket, []) for bucket in range(4)]).sort("person_id")
    assert frame["deleted"].to_list() == [False] * 5 + [True, False]


def test_changed_dtype_is_refused(uri: str, access: KeyAccess) -> None:
    """The error names the column and both types, and the table does not change."""
    ingest(uri, rows(0, 5), "a", access)
    other = pa.schema([BASE[0], ("amount", pa.string()), *TIMES])
    with pytest.raises(SchemaMismatch, match=r"'amount'.*double.*string"):
        ingest(uri, rows(5, 5, schema=other, amount=["x"] * 5), "b", access)
    assert newest(uri, access).rows == 5


def test_table_keeps_its_number_of_buckets(uri: str, access: KeyAccess) -> None:
    """A later configuration does not change the number of buckets."""
    offline.create_table(uri, SCHEMA, num_buckets=4)
    assert offline.num_buckets(offline.create_table(uri, SCHEMA, num_buckets=16)) == 4


def test_view_without_rows_says_what_to_run(uri: str, access: KeyAccess) -> None:
    """The error for a view without a table names the command to run."""
    with pytest.raises(TrainingSetError, match=r"feature_jobs\.ingest view=income"):
        newest(uri, access)


def test_reader_without_keys_reads_public_columns_only(uri: str, access: KeyAccess) -> None:
    """Any Delta reader reads the public columns. A reader with the keys reads all columns."""
    view = make_spec("income", ["person_id"], amount="float64")
    ingest(uri, rows(0, 40), "a", access, view_protection(view))
    table = pl.scan_delta(uri)
    assert table.select("event_timestamp", "ingest_seq").collect().height == 40
    for hidden in ("amount", "person_id"):
        with pytest.raises(pl.exceptions.ComputeError, match="ncrypt"):
            table.select(hidden).collect()
    pinned = newest(uri, access, protection=view_protection(view))
    frame = pl.concat(pinned.read(bucket, ["amount"]) for bucket in range(4))
    assert sorted(frame["amount"]) == [float(number) for number in range(40)]
    log = "".join(path.read_text() for path in Path(uri, "_delta_log").glob("*.json"))
    assert "minValues" not in log


def test_replaced_file_is_refused(uri: str, access: KeyAccess) -> None:
    """A file of another bucket, of another table with the same keys, or without encryption is refused."""
    protection = Protection(default="features/income/internal", keys=tuple((name, None) for name, _ in TIMES))
    ingest(uri, rows(0, 40), "a", access, protection)
    other = f"{uri.rsplit('/', 1)[0]}/wages"
    ingest(other, rows(0, 40), "a", access, protection)
    files = newest(uri, access, protection=protection).files
    victim, beside = (Path(uri, file.path) for file in files[:2])
    plain = pl.read_parquet(Path(f"{uri}-plain", write(f"{uri}-plain", rows(0, 40), "a", access)[0].path))
    original = victim.read_bytes()
    for content in (beside.read_bytes(), Path(other, files[0].path).read_bytes(), None):
        if content is None:
            plain.write_parquet(victim)
        else:
            victim.write_bytes(content)
        with pytest.raises(ProtectedFileCorrupt, match=r"belongs at|signed by no key"):
            newest(uri, access, protection=protection).read(files[0].bucket, ["amount"])
    victim.write_bytes(original)
    assert newest(uri, access, protection=protection).read(files[0].bucket, ["amount"]).height


def test_older_view_version_reads_table_with_a_newer_feature(uri: str, access: KeyAccess) -> None:
    """The reader does not need the key of a feature that it does not read."""
    keys = tuple((name, None) for name, _ in TIMES)
    older = Protection(default="features/income/internal", keys=keys)
    newer = Protection(default=older.default, keys=(*keys, ("sector", "features/income/personal")))
    wider = pa.schema([*BASE, ("sector", pa.string()), *TIMES])
    ingest(uri, rows(0, 5, schema=wider, sector=["x"] * 5), "a", access, newer)
    pinned = newest(uri, access, protection=older)
    frame = pl.concat(pinned.read(bucket, ["amount"]) for bucket in {file.bucket for file in pinned.files})
    assert sorted(frame["amount"]) == [0.0, 1.0, 2.0, 3.0, 4.0]
