"""Rebucketing keeps rows and joins, with concurrent writers and after a kill. Older versions keep their buckets."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from cluster.errors import CommitConflict, SourceError
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureTableRewritten
from cluster.security.keys.access import KeyAccess
from feature_jobs.compact import record_rewrites
from feature_jobs.store.offline import compaction, parts, rebucketing
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.compaction import current_target, fragmented_buckets, rewrite
from feature_jobs.store.offline.rebucketing import Rebucketed, rebucket
from feature_jobs.store.offline.removal import RemovalReason, remove_rows
from feature_jobs.store.offline.row_hash import row_hash
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.offline.training_set import build, join_in_process
from tests.processes import forks
from tests.projects.corrected_table import PEOPLE, ROWS, START, VIEW, ingest, joined, new_table, pinned
from tests.projects.tables import batch_of, pin, target_of
from tests.projects.views import make_spec, service_of

OTHER = make_spec("household", ["person_id"], amount="float64")
BATCHES = 3


@pytest.fixture
def uri(tmp_path: Path, access: KeyAccess) -> str:
    """Return a table of several batches."""
    return new_table(tmp_path, access, batches=BATCHES)


def rows_of(table: Snapshot) -> pl.DataFrame:
    """Return all rows of a table in one order."""
    frames = [table.read(bucket, ["amount"]) for bucket in range(table.num_buckets)]
    return pl.concat(frame for frame in frames if frame.height).sort("ingest_seq")


def run_all(step: Callable[..., object], calls: object) -> list[object]:
    return [step(*arguments) for arguments in calls]  # type: ignore[attr-defined]


def again(uri: str, access: KeyAccess, buckets: int) -> Rebucketed:
    return rebucket(lambda: pinned(uri, access), buckets, num_columns=6, run_all=run_all)


def part_files(uri: str) -> list[Path]:
    return list(Path(uri).glob("bucket=*/part-*"))


def new_files(uri: str) -> list[Path]:
    return list(Path(uri).glob("bucket=*/rebucketed-*"))


@pytest.mark.parametrize("buckets", [8, 1, 3])
def test_rows_and_joins_are_the_same_in_other_buckets(uri: str, access: KeyAccess, buckets: int) -> None:
    """More buckets, fewer, and a number that neither divides the old one nor is divided by it. No part is left."""
    before = pinned(uri, access)
    result = again(uri, access, buckets)
    after = pinned(uri, access)
    assert result == (before.version + 1, len(before.files))
    assert (after.version, after.num_buckets) == (result.version, buckets)
    assert rows_of(after).equals(rows_of(before))
    assert joined(after) == joined(before)
    assert fragmented_buckets(after) == []
    assert part_files(uri) == []
    assert pl.scan_delta(uri).select(pl.len()).collect().item() == before.rows


def test_older_versions_keep_their_buckets(uri: str, access: KeyAccess) -> None:
    """A pinned snapshot, and every older version, are read as before, also after a second rebucketing."""
    before = pinned(uri, access)
    expected = [joined(pinned(uri, access, version)) for version in range(1, before.version + 1)]
    again(uri, access, 8)
    again(uri, access, 4)
    assert joined(before) == expected[-1]
    versions = [pinned(uri, access, version) for version in range(1, before.version + 3)]
    assert [table.num_buckets for table in versions] == [2, 2, 2, 8, 4]
    assert [joined(table) for table in versions] == [*expected, expected[-1], expected[-1]]


def test_checkpoint_keeps_the_number_of_buckets(uri: str, access: KeyAccess) -> None:
    """Delta forgets no application transaction in a checkpoint."""
    again(uri, access, 8)
    DeltaTable(uri).create_checkpoint()
    ingest(uri, access, BATCHES, buckets=8)
    assert pinned(uri, access).num_buckets == 8


def test_views_with_other_numbers_of_buckets_are_joined(uri: str, access: KeyAccess, tmp_path: Path) -> None:
    """A training set of two views is the same before and after one of them is bucketed anew."""
    other = f"{tmp_path}/features/household"
    ingest(other, access, 0, buckets=4, view=OTHER)

    def both() -> str:
        tables = {"income": pinned(uri, access), "household": pin(target_of(other, OTHER, access))}
        return row_hash(build(service_of(VIEW, OTHER), tables, PEOPLE, join_parts=join_in_process))

    expected = both()
    again(uri, access, 16)
    assert both() == expected


def test_rows_of_a_concurrent_ingestion_are_distributed_too(
    uri: str, access: KeyAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that is committed in the meantime conflicts with the rebucketing, which then adds its rows."""
    real = rebucketing.commit_replacement
    ingested: list[int] = []

    def late(*arguments: object, **options: object) -> None:
        if not ingested:
            ingested.append(BATCHES)
            ingest(uri, access, BATCHES)
        real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rebucketing, "commit_replacement", late)
    again(uri, access, 8)
    after = pinned(uri, access)
    assert (after.num_buckets, after.rows) == (8, (BATCHES + 1) * ROWS)
    assert rows_of(after)["ingest_seq"].to_list() == list(range((BATCHES + 1) * ROWS))


def test_ingestion_that_began_before_conflicts(uri: str, access: KeyAccess) -> None:
    """Its files are in the old buckets, so it has to run again."""
    seen = DeltaTable(uri)
    again(uri, access, 8)
    with pytest.raises(CommitConflict, match="Run it again"):
        offline.commit(seen, pa.schema(seen.schema().to_arrow()).remove(6), [], batch_of("x", 0), seq=10_000)


def test_compaction_that_began_before_changes_nothing(uri: str, access: KeyAccess) -> None:
    """The files that it wants to replace are not in the table any more."""
    table = pinned(uri, access)
    again(uri, access, 8)
    with pytest.raises(SourceError, match="rewrote files"):
        rewrite(table, current_target(table), fragmented_buckets(table))
    with pytest.raises(SourceError, match="rewrote files"):
        compaction.replace_files(table, [], [], metadata={})


def test_rebucketing_that_began_before_a_compaction_changes_nothing(
    uri: str, access: KeyAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new files contain the rows of files that are not in the table any more."""
    real = rebucketing.commit_replacement

    def late(*arguments: object, **options: object) -> None:
        table = pinned(uri, access)
        rewrite(table, current_target(table), fragmented_buckets(table))
        real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rebucketing, "commit_replacement", late)
    with pytest.raises(SourceError, match="rewrote files"):
        again(uri, access, 8)
    assert pinned(uri, access).num_buckets == 2
    assert new_files(uri) == []


def test_rebucketing_beside_many_commits_leaves_no_file(
    uri: str, access: KeyAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt loses against another commit. Only the first round runs in tasks, because later ones are small."""
    rounds: list[int] = []

    def lost(*_: object, **__: object) -> None:
        rounds.append(len(in_tasks))
        ingest(uri, access, BATCHES + len(rounds))
        raise CommitFailedError("conflict")

    in_tasks: list[object] = []

    def counted(step: Callable[..., object], calls: object) -> list[object]:
        in_tasks.append(step)
        return run_all(step, calls)

    monkeypatch.setattr(rebucketing, "commit_replacement", lost)
    monkeypatch.setattr(rebucketing, "MAX_COMMITS", 3)
    with pytest.raises(SourceError, match="3 times in a row"):
        rebucket(lambda: pinned(uri, access), 8, num_columns=6, run_all=counted)
    assert rounds == [2, 2, 2]
    assert new_files(uri) == []


def test_failed_rebucketing_leaves_no_file(
    uri: str, access: KeyAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task fails after others have written new buckets, for example on a full disk."""
    real = rebucketing._merge

    def full(paths: list[str], *arguments: Any) -> object:
        if new_files(uri):
            raise OSError("no space left")
        return real(paths, *arguments)

    monkeypatch.setattr(rebucketing, "_merge", full)
    with pytest.raises(OSError, match="no space"):
        again(uri, access, 8)
    assert new_files(uri) == part_files(uri) == []


def kill_at(uri: str, access: KeyAccess, name: str, *, after: bool) -> None:
    """Rebucket, and kill this process before or after a function is called for the first time."""
    real = getattr(rebucketing, name)

    def killed(*arguments: object, **options: object) -> object:
        if after:
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(rebucketing, name, killed)
    again(uri, access, 8)


@pytest.mark.parametrize(
    ("name", "after", "buckets"),
    [
        ("_split", False, 2),
        ("_split", True, 2),
        ("_merge", True, 2),
        ("commit_replacement", False, 2),
        ("commit_replacement", True, 8),
    ],
)
def test_kill_leaves_the_old_or_the_new_layout(
    uri: str,
    access: KeyAccess,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    after: bool,
    buckets: int,
) -> None:
    """The next run does the job, records the event once, and removes the parts of the killed run after a day."""
    expected = joined(pinned(uri, access))
    process = forks.context().Process(target=kill_at, args=(uri, access, name), kwargs={"after": after})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    table = pinned(uri, access)
    assert (table.num_buckets, joined(table)) == (buckets, expected)
    again(uri, access, 16)
    monkeypatch.setattr(parts, "MAX_AGE", timedelta(0))
    again(uri, access, 8)
    assert joined(pinned(uri, access)) == expected
    assert part_files(uri) == []
    record_rewrites(ledger, "income", uri, actor="test")
    record_rewrites(ledger, "income", uri, actor="test")
    events = [entry.payload["num_buckets"] for entry in ledger.entries(FeatureTableRewritten)]
    assert events == ([16, 8] if buckets == 2 else [8, 16, 8])


def test_removal_finds_rows_in_buckets_that_the_table_had_before(
    uri: str, access: KeyAccess, ledger: Ledger
) -> None:
    """Old files with removed rows are deleted, also those of buckets that the newest version does not have."""
    again(uri, access, 1)
    remove_rows(
        pinned(uri, access),
        pl.col("event_timestamp") < START + timedelta(minutes=1),
        RemovalReason(cause="test"),
        ledger,
        view="income",
        actor="test",
    )
    left = pinned(uri, access)
    assert left.rows == (BATCHES - 1) * ROWS
    on_disk = [path.relative_to(uri).as_posix() for path in Path(uri).glob("bucket=*/*.parquet")]
    assert all(not name.startswith(("bucket=0/0-", "bucket=1/0.", "bucket=0/0.")) for name in on_disk)
