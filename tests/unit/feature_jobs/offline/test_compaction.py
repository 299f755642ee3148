"""Rewriting files keeps rows and joins, with concurrent writers and after a kill."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from cluster.errors import SourceError
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureTableRewritten
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess, key_store
from feature_jobs.compact import record_rewrites
from feature_jobs.store.offline import compaction
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.compaction import (
    Rewrite,
    current_target,
    fragmented_buckets,
    past_rewrites,
    rewrite,
)
from feature_jobs.store.offline.tables import Snapshot
from tests.projects.corrected_table import ROWS, ingest, joined, new_table, pinned
from tests.projects.tables import batch_of

BATCHES = 4


@pytest.fixture
def uri(tmp_path: Path, access: KeyAccess) -> str:
    """Return a table of several batches."""
    return new_table(tmp_path, access, batches=BATCHES)


def compact(uri: str, access: KeyAccess) -> int:
    table = pinned(uri, access)
    return rewrite(table, current_target(table), fragmented_buckets(table))[0]


def test_compaction_leaves_one_sorted_file_per_bucket(uri: str, access: KeyAccess) -> None:
    """Joins have the same hash as before, at the newest and at every older version."""
    before = pinned(uri, access)
    assert len(before.files) == 2 * BATCHES
    expected = [joined(pinned(uri, access, version)) for version in range(1, before.version + 1)]
    compact(uri, access)
    after = pinned(uri, access)
    assert [file.bucket for file in after.files] == [0, 1]
    assert (after.rows, fragmented_buckets(after)) == (before.rows, [])
    assert joined(after) == expected[-1]
    assert [joined(pinned(uri, access, version)) for version in range(1, before.version + 1)] == expected
    for bucket in range(2):
        assert after.read(bucket, ["amount"])["event_timestamp"].is_sorted()
    assert pl.scan_delta(uri).select(pl.len()).collect().item() == before.rows
    assert "minValues" not in "".join(path.read_text() for path in Path(uri, "_delta_log").glob("*.json"))


def test_concurrent_ingestion_keeps_its_rows(
    uri: str, access: KeyAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compaction is committed on top of an ingestion that came first."""
    table = pinned(uri, access)
    real = compaction._merged

    def slow(*arguments: object) -> object:
        if DeltaTable(uri).version() == table.version:
            ingest(uri, access, BATCHES)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compaction, "_merged", slow)
    rewrite(table, current_target(table), fragmented_buckets(table))
    after = pinned(uri, access)
    assert after.rows == (BATCHES + 1) * ROWS
    assert len(after.files) == 4


def test_ingestion_that_began_before_the_compaction_conflicts(uri: str, access: KeyAccess) -> None:
    """It commits against the table version that it read, so it has to run again."""
    seen = DeltaTable(uri)
    compact(uri, access)
    with pytest.raises(SourceError, match="Run it again"):
        offline.commit(seen, pa.schema(seen.schema().to_arrow()).remove(6), [], batch_of("x", 0), seq=10_000)
    ingest(uri, access, BATCHES)
    assert pinned(uri, access).rows == (BATCHES + 1) * ROWS


def test_second_of_two_concurrent_compactions_changes_nothing(uri: str, access: KeyAccess) -> None:
    """The files that it wants to replace are not in the table any more."""
    table = pinned(uri, access)
    compact(uri, access)
    with pytest.raises(SourceError, match="rewrote files"):
        rewrite(table, current_target(table), fragmented_buckets(table))
    assert pinned(uri, access).rows == BATCHES * ROWS


def test_kill_before_the_commit_leaves_the_table_unchanged(
    uri: str, access: KeyAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written files are unused, and the next run does the whole job."""
    expected = joined(pinned(uri, access))
    table = pinned(uri, access)
    monkeypatch.setattr(
        compaction, "replace_files", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        rewrite(table, current_target(table), fragmented_buckets(table))
    monkeypatch.undo()
    assert (pinned(uri, access).files, joined(pinned(uri, access))) == (table.files, expected)
    compact(uri, access)
    assert joined(pinned(uri, access)) == expected


def test_next_run_records_the_event_of_a_killed_run(uri: str, access: KeyAccess, ledger: Ledger) -> None:
    """The event is appended once."""
    version = compact(uri, access)
    assert past_rewrites(DeltaTable(uri)) == {version: Rewrite(2 * BATCHES)}
    assert record_rewrites(ledger, "income", uri, actor="test") == 2 * BATCHES
    assert record_rewrites(ledger, "income", uri, actor="test") == 0
    (event,) = ledger.entries(FeatureTableRewritten)
    expected = {"view": "income", "table_version": version, "files_replaced": 2 * BATCHES}
    assert event.payload == expected | {"num_buckets": None}


def test_rewrite_after_a_key_rotation_uses_the_newest_keys(uri: str, access: KeyAccess) -> None:
    """Before the rewrite only new files have the newest keys, after it all files have."""
    store, files = key_store(access), protected_files(access)
    newest = {
        f"v{store.rotate(f'features/income/{sensitivity}')}" for sensitivity in ("internal", "personal")
    }
    table = pinned(uri, access)

    def versions(table: Snapshot) -> set[str]:
        wrapped = [files.keys(f"{uri}/{file.path}").wrapped for file in table.files]
        return {text.split(":")[1] for keys in wrapped for text in keys.values()}

    assert versions(table).isdisjoint(newest)
    files.forget()
    rewrite(table, current_target(table), {file.bucket for file in table.files})
    after = pinned(uri, access)
    assert versions(after) == newest
    assert joined(after) == joined(table)
