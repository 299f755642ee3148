"""Quarantined rows are read back as the source had them, checked again, and stored exactly once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from cluster.ledger import Ledger
from cluster.ledger.events import BatchIngested, QuarantineReplayed
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import ProtectedFileCorrupt
from cluster.security.keys.access import KeyAccess, key_store
from feature_jobs import replay as job
from feature_jobs.store import FeatureView, Keep, Range, Unique
from feature_jobs.store.catalog.protection import quarantine_aad, quarantine_protection
from feature_jobs.store.ingestion.quarantine import quarantined, source_rows, source_schema
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.quarantine_replay import recheck_rows
from feature_jobs.store.ingestion.validation import RAW, REASON, prepare
from feature_jobs.store.offline import tables as offline
from tests.projects.tables import pin, target_of
from tests.projects.views import make_spec, make_view

NOW = datetime(2024, 6, 1, tzinfo=UTC)
AT = datetime(2024, 1, 1, tzinfo=UTC)
SPEC = make_spec("income", ["person_id"], amount="float64")


def view(*checks: Any) -> FeatureView:
    return make_view(checks=checks)


NOT_NEGATIVE = view(Range("amount", minimum=0))


def block(amount: list[float], keys: list[int] | None = None, **more: Any) -> pa.Table:
    keys = list(range(len(amount))) if keys is None else keys
    at = pa.array([AT] * len(amount), pa.timestamp("ns", "UTC"))
    return pa.table({"person_id": pa.array(keys, pa.int32()), "amount": amount, "at": at, **more})


def quarantine_of(source: pa.Table, of: FeatureView) -> pa.Table:
    """Return the quarantine file that ingestion writes."""
    prepared = prepare(source, of, now=NOW)
    bad = prepared.filter(prepared[REASON].is_valid()).select([REASON, RAW])
    bad = bad.rename_columns(["reason", "raw"])
    num_rows = bad.num_rows
    bad = bad.append_column("ingested_at", pa.array([NOW] * num_rows, pa.timestamp("us", "UTC")))
    return bad.append_column("ingest_seq", pa.array(range(num_rows), pa.int64()))


def read_back(file: pa.Table) -> pa.Table:
    """Return a file's rows as the source had them."""
    schema = source_schema(file)
    assert schema is not None
    return source_rows(file, schema)


def test_rows_are_read_back_with_their_types_and_values() -> None:
    """This includes types that JSON does not have."""
    columns = {
        "code": pa.array(["7", None]).dictionary_encode(),
        "day": pa.array([date(2024, 1, 2), None]),
        "paid": pa.array([Decimal("1.50"), None]),
        "hash": pa.array([b"\x00\xff", None]),
        "tags": pa.array([["a", "b"], None]),
        "small": pa.array([0.1, None], pa.float32()),
        "huge": pa.array([2**63 - 1, None]),
        "noon": pa.array([AT.time(), None]),
        "nothing": pa.nulls(2),
    }
    source = block([-1.0, -2.0], **columns)
    rows = read_back(quarantine_of(source, NOT_NEGATIVE))
    assert rows.schema == source.schema
    assert rows.to_pylist() == source.to_pylist()


def test_times_outside_pythons_range_are_read_back() -> None:
    """The column may also contain times inside the range."""
    far = pa.array([316_537_891_200_000_000, 5], pa.timestamp("us"))
    parts = [quarantine_of(block([-1.0], far=far.slice(i, 1)), NOT_NEGATIVE) for i in range(2)]
    assert read_back(pa.concat_tables(parts))["far"].combine_chunks().equals(far)


def test_types_are_stored_in_the_file(tmp_path: Path, access: KeyAccess) -> None:
    """They are metadata of the Parquet schema."""
    files = QuarantineFiles(folder=str(tmp_path), view="income", access=access)
    files.write("b1", quarantine_of(block([-1.0]), NOT_NEGATIVE))
    assert read_back(files.read("b1")).schema == block([-1.0]).schema


def untyped_file(*rows: dict[str, Any], reason: str = "x") -> pa.Table:
    """Return a quarantine file without the source's types."""
    raw = [json.dumps(row) for row in rows]
    return pa.table({"reason": [reason] * len(rows), "raw": raw, "ingest_seq": list(range(len(rows)))})


def test_rows_without_types_are_checked_like_a_push() -> None:
    """The rows are: a good one, one of a wrong type, one without a key, and one of an older release."""
    file = untyped_file(
        {"person_id": 1, "amount": 2.5, "at": "2024-01-01T00:00:00Z", "deleted": False},
        {"person_id": 2, "amount": "many", "at": "2024-01-01T00:00:00Z"},
        {"person_id": None, "amount": 1.0, "at": "2024-01-01T00:00:00Z"},
        {"person_id": 4, "amount": 3, "at": "2024-01-01 00:00:00+00:00", "note": "not of the view"},
    )
    rechecked = recheck_rows(file, view(), now=NOW, baseline=None)
    assert rechecked.reasons.to_pylist() == [None, "amount is no float64", "x", None]
    assert rechecked.good is not None
    assert rechecked.good.select(["person_id", "amount", "event_timestamp"]).to_pylist() == [
        {"person_id": 1, "amount": 2.5, "event_timestamp": AT},
        {"person_id": 4, "amount": 3.0, "event_timestamp": AT},
    ]


def test_more_rows_than_a_push_may_have_are_checked_in_parts() -> None:
    """All rows are checked, also those beyond the limit of one push."""
    rows = [{"person_id": n, "amount": float(n), "at": "2024-01-01T00:00:00Z"} for n in range(2500)]
    rechecked = recheck_rows(untyped_file(*rows), view(Range("amount", maximum=2398)), now=NOW, baseline=None)
    assert rechecked.good is not None
    assert rechecked.good["person_id"].to_pylist() == list(range(2399))
    assert rechecked.reasons.null_count == 2399


@pytest.mark.parametrize("rule", [Unique(["person_id"]), Unique(["person_id"], keep=Keep.first)])
def test_repeated_rows_stay_while_the_view_has_the_unique_rule(rule: Unique) -> None:
    """In its file, a row may be the only one of its kind, but it would replace the row that was stored."""
    file = quarantine_of(block([1.0, 2.0, -1.0], keys=[1, 1, 2]), view(rule, Range("amount", minimum=0)))
    num_repeated = 2 if rule.keep is Keep.none else 1
    for current_view, expected in ((view(rule), num_repeated), (view(), 0)):
        rechecked = recheck_rows(file, current_view, now=NOW, baseline=None)
        assert rechecked.reasons.is_valid().to_pylist().count(True) == expected


def test_quarantined_rows_are_counted_from_events(tmp_path: Path) -> None:
    """The counts follow ingestion, a partial replay and a full replay. Other views do not count."""
    common: dict[str, Any] = {"view_version": "v", "table_version": 1, "rows_in": 9, "rows_stored": 7}
    ingested = BatchIngested(
        view="a", ingest_id="1", source="", source_digest="", rows_quarantined=2, reasons={"x": 2}, **common
    )
    partial = QuarantineReplayed(
        view="a", batch="1", replay_id="r", rows_quarantined=1, reasons={"y": 1}, **common
    )
    full = QuarantineReplayed(view="a", batch="1", replay_id="s", rows_quarantined=0, reasons={}, **common)
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    for event, expected in ((ingested, {"1": {"x": 2}}), (partial, {"1": {"y": 1}}), (full, {})):
        ledger.append(event, actor="user:a")
        assert quarantined(ledger, "a") == expected
        assert quarantined(ledger, "b") == {}


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def batch_replay(tmp_path: Path, access: KeyAccess) -> job.BatchReplay:
    """A quarantine with the amounts -1, -2 and -3, of which the view now accepts two. The table is empty."""
    target = target_of(str(tmp_path / "features" / "income"), SPEC, access)
    files = QuarantineFiles(folder=str(tmp_path / "quarantine" / "income"), view="income", access=access)
    files.write("b1", quarantine_of(block([-1.0, -2.0, -3.0]), NOT_NEGATIVE))
    return job.BatchReplay(view=view(Range("amount", minimum=-2)), batch="b1", files=files, target=target)


def run_replay(batch_replay: job.BatchReplay) -> QuarantineReplayed:
    """Replay a batch, and finish the replay."""
    event = job.replay(batch_replay, None, now=NOW)
    job.finish(batch_replay.files, event)
    return event


def stored_amounts(batch_replay: job.BatchReplay) -> list[float]:
    pinned = pin(batch_replay.target)
    tables = [table for bucket in range(2) for table in pinned.tables(bucket)]
    return sorted(value for table in tables for value in table["amount"].to_pylist())


def quarantined_rows(batch_replay: job.BatchReplay) -> list[tuple[float, str]]:
    file = batch_replay.files.read(batch_replay.batch)
    return [(json.loads(row["raw"])["amount"], row["reason"]) for row in file.to_pylist()]


def test_good_rows_are_stored_and_bad_rows_stay_with_a_new_reason(batch_replay: job.BatchReplay) -> None:
    """Rows in = rows stored + rows that stay."""
    event = run_replay(batch_replay)
    assert (event.rows_in, event.rows_stored, event.rows_quarantined) == (3, 2, 1)
    assert event.reasons == {"amount outside -2..": 1}
    assert stored_amounts(batch_replay) == [-2.0, -1.0]
    assert quarantined_rows(batch_replay) == [(-3.0, "amount outside -2..")]


def test_another_batchs_file_is_not_replayed(batch_replay: job.BatchReplay) -> None:
    """Files are bound to their batch, also after a replay. Files of an earlier release are not bound, and are read."""
    quarantine, other = batch_replay.files, dataclasses.replace(batch_replay, batch="b2")
    path, other_path = quarantine.path("b1"), quarantine.path("b2")
    shutil.copy(path, other_path)
    with pytest.raises(ProtectedFileCorrupt, match="belongs at"):
        job.replay(other, None, now=NOW)
    files = protected_files(quarantine.access)
    files.write(files.read(path), other_path, quarantine_protection("income"))
    assert job.replay(other, None, now=NOW).rows_in == 3
    run_replay(batch_replay)
    assert files.keys(path).place == quarantine_aad("income", "b1")


def test_files_have_the_same_columns_in_the_same_order(tmp_path: Path, access: KeyAccess) -> None:
    """The writer orders the columns of all callers."""
    files = QuarantineFiles(folder=str(tmp_path), view="income", access=access)
    rows = quarantine_of(block([-1.0]), NOT_NEGATIVE)
    for order in (rows.column_names, rows.column_names[::-1]):
        files.write("b1", rows.select(order))
        assert files.read("b1").column_names == ["reason", "raw", "ingested_at", "ingest_seq"]


def test_replay_killed_after_its_commit_stores_nothing_twice(batch_replay: job.BatchReplay) -> None:
    """The next run only finishes the replay, even if the view was changed meanwhile."""
    first = job.replay(batch_replay, None, now=NOW)
    second = run_replay(dataclasses.replace(batch_replay, view=view()))
    assert (second.replay_id, second.rows_stored) == (first.replay_id, 2)
    assert stored_amounts(batch_replay) == [-2.0, -1.0]
    assert [amount for amount, _ in quarantined_rows(batch_replay)] == [-3.0]


def test_replay_killed_before_its_commit_loses_nothing(
    batch_replay: job.BatchReplay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows are still in quarantine, and the next run does the whole replay."""

    def be_killed(*arguments: Any, **named: Any) -> int:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(offline, "commit", be_killed)
        with pytest.raises(Killed):
            job.replay(batch_replay, None, now=NOW)
    assert len(quarantined_rows(batch_replay)) == 3
    run_replay(batch_replay)
    assert stored_amounts(batch_replay) == [-2.0, -1.0]


def key_versions(files: QuarantineFiles) -> set[str]:
    """Return the key versions of a view's quarantine files, with those of unfinished replays."""
    wrapped = [
        protected_files(files.access).keys(str(path)).wrapped
        for path in Path(files.folder).rglob("*.parquet")
    ]
    return {text.split(":")[1] for keys in wrapped for text in keys.values()}


def rotate_quarantine_key(files: QuarantineFiles) -> str:
    """Rotate the key, encrypt the quarantine again, and return the new key version."""
    version = key_store(files.access).rotate("quarantine/income/sensitive")
    assert files.reencrypt() == len(files.batches())
    return f"v{version}"


def test_rotation_encrypts_the_rows_of_a_killed_replay_again(batch_replay: job.BatchReplay) -> None:
    """The replay was killed after its commit. Its end must not bring back rows under the old key."""
    job.replay(batch_replay, None, now=NOW)
    newest = rotate_quarantine_key(batch_replay.files)
    assert key_versions(batch_replay.files) == {newest}
    run_replay(batch_replay)
    assert key_versions(batch_replay.files) == {newest}
    assert [amount for amount, _ in quarantined_rows(batch_replay)] == [-3.0]
    assert stored_amounts(batch_replay) == [-2.0, -1.0]


def test_rotation_deletes_rows_that_no_replay_can_publish(batch_replay: job.BatchReplay) -> None:
    """The batch's rows changed after a replay was killed, so no later replay has the id of the pending file."""
    files = batch_replay.files
    job.replay(batch_replay, None, now=NOW)
    files.write("b1", quarantine_of(block([-1.0, -2.0]), NOT_NEGATIVE))
    newest = rotate_quarantine_key(files)
    assert key_versions(files) == {newest}
    assert [path.name for path in Path(files.folder).rglob("*.parquet")] == ["b1.parquet"]


def test_quarantine_file_is_removed_once_all_rows_are_good(batch_replay: job.BatchReplay) -> None:
    """A later replay is refused, because the quarantine is empty."""
    whole = dataclasses.replace(batch_replay, view=view())
    run_replay(whole)
    assert stored_amounts(batch_replay) == [-3.0, -2.0, -1.0]
    with pytest.raises(ValueError, match="no row in quarantine"):
        job.select_batches(whole.files, None)


def test_replay_without_good_rows_does_not_touch_the_table(batch_replay: job.BatchReplay) -> None:
    """The rows stay with their new reason, and the table gets no new version."""
    event = run_replay(dataclasses.replace(batch_replay, view=view(Range("amount", minimum=5))))
    assert (event.rows_stored, event.table_version) == (0, None)
    assert [reason for _, reason in quarantined_rows(batch_replay)] == ["amount outside 5.."] * 3
    assert not DeltaTable.is_deltatable(batch_replay.target.uri)


def test_replay_is_recorded_once_and_only_if_it_changed_something(ledger: Ledger) -> None:
    """The next run records the replay of a killed run. A replay without any change is not recorded."""
    common: dict[str, Any] = {"view": "income", "view_version": "v"}
    counts: dict[str, Any] = {"rows_in": 9, "rows_stored": 7, "rows_quarantined": 2, "table_version": 1}
    ingested = BatchIngested(ingest_id="b", source="", source_digest="", reasons={"x": 2}, **counts, **common)
    ledger.append(ingested, actor="ann")

    def replayed(replay_id: str, stored: int, **reasons: int) -> QuarantineReplayed:
        num_bad = sum(reasons.values())
        return QuarantineReplayed(
            **common,
            batch="b",
            replay_id=replay_id,
            rows_in=stored + num_bad,
            rows_stored=stored,
            rows_quarantined=num_bad,
            reasons=reasons,
            table_version=2 if stored else None,
        )

    num_events = []
    runs = [
        ("1", 0, {"x": 2}),
        ("1", 0, {"y": 2}),
        ("1", 1, {"y": 1}),
        ("1", 1, {"y": 1}),
        ("2", 0, {"y": 1}),
    ]
    for replay_id, stored, reasons in runs:
        job.record_replay(ledger, replayed(replay_id, stored, **reasons), actor="ann")
        num_events.append(len(list(ledger.entries(QuarantineReplayed))))
    assert num_events == [0, 1, 2, 2, 2]
