"""Quarantined rows come back as the source had them, are tried again, and are stored once."""

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

from cluster.ledger import open_ledger
from cluster.ledger.events import BatchIngested, QuarantineReplayed
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import ProtectedFileCorrupt
from cluster.security.keys.access import KeyAccess
from cluster.settings import PlatformConfig, StorageConfig
from feature_jobs import replay as job
from feature_jobs.store import Entity, FeatureView, Field, FileSource, Keep, Range, Unique
from feature_jobs.store.catalog.protection import quarantine_place, quarantine_protection, view_protection
from feature_jobs.store.catalog.specifications import FieldSpec, ViewSpec
from feature_jobs.store.ingestion.quarantine import quarantined, source_rows, source_schema
from feature_jobs.store.ingestion.quarantine_replay import try_again
from feature_jobs.store.ingestion.validation import RAW, REASON, prepare
from feature_jobs.store.offline import tables as offline

NOW = datetime(2024, 6, 1, tzinfo=UTC)
AT = datetime(2024, 1, 1, tzinfo=UTC)
SPEC = ViewSpec(
    name="income",
    version="v",
    join_keys=["person_id"],
    fields=[FieldSpec(name="amount", dtype="float64", sensitivity="internal", categorical=False)],
    ttl_s=None,
)


def view(*checks: Any) -> FeatureView:
    return FeatureView(
        "income",
        entities=[Entity("person", join_keys=["person_id"])],
        source=FileSource("x.parquet", event_timestamp="at"),
        schema=[Field("amount", "float64")],
        checks=checks,
    )


def block(amount: list[float], keys: list[int] | None = None, **more: Any) -> pa.Table:
    keys = list(range(len(amount))) if keys is None else keys
    at = pa.array([AT] * len(amount), pa.timestamp("ns", "UTC"))
    return pa.table({"person_id": pa.array(keys, pa.int32()), "amount": amount, "at": at, **more})


def quarantine_of(source: pa.Table, of: FeatureView) -> pa.Table:
    """What ingestion puts aside."""
    found = prepare(source, of, now=NOW)
    bad = found.filter(found[REASON].is_valid()).select([REASON, RAW]).rename_columns(["reason", "raw"])
    count = bad.num_rows
    bad = bad.append_column("ingested_at", pa.array([NOW] * count, pa.timestamp("us", "UTC")))
    return bad.append_column("ingest_seq", pa.array(range(count), pa.int64()))


def again(file: pa.Table) -> pa.Table:
    """A file's rows as the source had them."""
    schema = source_schema(file)
    assert schema is not None
    return source_rows(file, schema)


def test_a_row_comes_back_with_the_types_and_values_it_had() -> None:
    """Also types that JSON does not have."""
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
    back = again(quarantine_of(source, view(Range("amount", minimum=0))))
    assert back.schema == source.schema
    assert back.to_pylist() == source.to_pylist()


def test_a_time_that_could_not_be_printed_comes_back() -> None:
    """Beside one that could."""
    far = pa.array([316_537_891_200_000_000, 5], pa.timestamp("us"))
    bad = view(Range("amount", minimum=0))
    parts = [quarantine_of(block([-1.0], far=far.slice(i, 1)), bad) for i in range(2)]
    assert again(pa.concat_tables(parts))["far"].combine_chunks().equals(far)


def test_types_survive_a_file(tmp_path: Path, access: KeyAccess) -> None:
    """They travel in the Parquet file's own schema."""
    file = quarantine_of(block([-1.0]), view(Range("amount", minimum=0)))
    files, path = protected_files(access), str(tmp_path / "q.parquet")
    files.write(file, path, quarantine_protection("income"))
    assert again(files.read(path)).schema == block([-1.0]).schema


def raw(*rows: dict[str, Any], reason: str = "x") -> pa.Table:
    """A file without types."""
    return pa.table(
        {
            "reason": [reason] * len(rows),
            "raw": [json.dumps(row) for row in rows],
            "ingest_seq": list(range(len(rows))),
        }
    )


def test_rows_without_types_are_tried_as_a_push_is() -> None:
    """Each by itself: one of the wrong type, one without a key, and one that an older release wrote with its times."""
    file = raw(
        {"person_id": 1, "amount": 2.5, "at": "2024-01-01T00:00:00Z", "deleted": False},
        {"person_id": 2, "amount": "many", "at": "2024-01-01T00:00:00Z"},
        {"person_id": None, "amount": 1.0, "at": "2024-01-01T00:00:00Z"},
        {"person_id": 4, "amount": 3, "at": "2024-01-01 00:00:00+00:00", "note": "not of the view"},
    )
    tried = try_again(file, view(), now=NOW, baseline=None)
    assert tried.reasons.to_pylist() == [None, "amount is no float64", "x", None]
    assert tried.good is not None
    assert tried.good.select(["person_id", "amount", "event_timestamp"]).to_pylist() == [
        {"person_id": 1, "amount": 2.5, "event_timestamp": AT},
        {"person_id": 4, "amount": 3.0, "event_timestamp": AT},
    ]


def test_many_pushed_rows_are_tried_in_parts() -> None:
    """More than one push may have."""
    rows = [{"person_id": n, "amount": float(n), "at": "2024-01-01T00:00:00Z"} for n in range(2500)]
    tried = try_again(raw(*rows), view(Range("amount", maximum=2398)), now=NOW, baseline=None)
    assert tried.good is not None
    assert tried.good["person_id"].to_pylist() == list(range(2399))
    assert tried.reasons.null_count == 2399


@pytest.mark.parametrize("rule", [Unique(["person_id"]), Unique(["person_id"], keep=Keep.first)])
def test_a_row_put_aside_for_its_likeness_stays_while_the_view_has_the_rule(rule: Unique) -> None:
    """In its file it may be alone, and would take the place of the one that was kept."""
    file = quarantine_of(block([1.0, 2.0, -1.0], keys=[1, 1, 2]), view(rule, Range("amount", minimum=0)))
    kept, without = view(rule), view()
    for of, stays in ((kept, 2 if rule.keep is Keep.none else 1), (without, 0)):
        tried = try_again(file, of, now=NOW, baseline=None)
        assert tried.reasons.is_valid().to_pylist().count(True) == stays


def test_what_lies_in_quarantine_follows_from_the_events() -> None:
    """Ingested, then replayed in part, then in full; other views do not count."""
    common: dict[str, Any] = {"view_version": "v", "table_version": 1, "rows_in": 9, "rows_stored": 7}
    ingested = BatchIngested(
        view="a", ingest_id="1", source="", source_digest="", rows_quarantined=2, reasons={"x": 2}, **common
    )
    part = QuarantineReplayed(
        view="a", batch="1", replay_id="r", rows_quarantined=1, reasons={"y": 1}, **common
    )
    full = QuarantineReplayed(view="a", batch="1", replay_id="s", rows_quarantined=0, reasons={}, **common)
    assert quarantined([ingested], "a") == {"1": {"x": 2}}
    assert quarantined([ingested, part], "a") == {"1": {"y": 1}}
    assert quarantined([ingested, part, full], "a") == {}
    assert quarantined([ingested], "b") == {}


class Broken(Exception):
    """The process ends here."""


@pytest.fixture
def place(tmp_path: Path, access: KeyAccess) -> job.Place:
    """A quarantine of three rows, -1, -2 and -3; nothing in the table."""
    folder, rows = str(tmp_path / "quarantine" / "income"), [-1.0, -2.0, -3.0]
    target = offline.Target(
        uri=str(tmp_path / "features" / "income"),
        keys=("person_id",),
        buckets=2,
        protection=view_protection(SPEC),
        access=access,
    )
    mended = view(Range("amount", minimum=-2))
    place = job.Place(view=mended, batch="b1", folder=folder, target=target)
    file = quarantine_of(block(rows), view(Range("amount", minimum=0)))
    where = quarantine_place("income", "b1")
    protected_files(access).write(file, place.path, quarantine_protection("income"), place=where)
    return place


def stored(place: job.Place) -> list[float]:
    uri = place.target.uri
    pinned = offline.snapshot(
        uri,
        view="income",
        keys=["person_id"],
        protection=place.target.protection,
        access=place.target.access,
    )
    return sorted(
        value
        for bucket in range(2)
        for table in pinned.tables(bucket)
        for value in table["amount"].to_pylist()
    )


def left(place: job.Place) -> list[tuple[float, str]]:
    file = protected_files(place.target.access).read(place.path)
    return [(json.loads(row["raw"])["amount"], row["reason"]) for row in file.to_pylist()]


def test_mended_rows_are_stored_and_the_others_stay_with_their_new_reason(place: job.Place) -> None:
    """In quarantine before = stored now + still there."""
    event = job.replay(place, None, now=NOW)
    job.finish(place, event)
    assert (event.rows_in, event.rows_stored, event.rows_quarantined) == (3, 2, 1)
    assert event.reasons == {"amount outside -2..": 1}
    assert stored(place) == [-2.0, -1.0]
    assert left(place) == [(-3.0, "amount outside -2..")]


def test_quarantine_of_another_batch_is_not_replayed(place: job.Place) -> None:
    """Files are bound to their batch, also what stays after a replay; one of an earlier release says nothing."""
    files, other = protected_files(place.target.access), dataclasses.replace(place, batch="b2")
    shutil.copy(place.path, other.path)
    with pytest.raises(ProtectedFileCorrupt, match="belongs at"):
        job.replay(other, None, now=NOW)
    files.write(files.read(place.path), other.path, quarantine_protection("income"))
    assert job.replay(other, None, now=NOW).rows_in == 3
    job.finish(place, job.replay(place, None, now=NOW))
    assert files.keys(place.path).place == quarantine_place("income", "b1")


def test_killed_after_the_commit_nothing_is_stored_twice(place: job.Place) -> None:
    """The next run only finishes, also when the view was changed meanwhile."""
    first = job.replay(place, None, now=NOW)
    other = job.Place(view=view(), batch=place.batch, folder=place.folder, target=place.target)
    again = job.replay(other, None, now=NOW)
    job.finish(other, again)
    assert (again.replay_id, again.rows_stored) == (first.replay_id, 2)
    assert stored(place) == [-2.0, -1.0]
    assert [amount for amount, _ in left(place)] == [-3.0]


def test_killed_before_the_commit_nothing_is_lost(place: job.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are still in quarantine, and the next run does it all."""

    def die(*arguments: Any, **named: Any) -> int:
        raise Broken

    with monkeypatch.context() as patched:
        patched.setattr(offline, "commit", die)
        with pytest.raises(Broken):
            job.replay(place, None, now=NOW)
    assert len(left(place)) == 3
    job.finish(place, job.replay(place, None, now=NOW))
    assert stored(place) == [-2.0, -1.0]


def test_when_all_rows_are_mended_the_quarantine_is_gone(place: job.Place) -> None:
    """And a batch that is gone cannot be replayed."""
    whole = job.Place(view=view(), batch=place.batch, folder=place.folder, target=place.target)
    job.finish(whole, job.replay(whole, None, now=NOW))
    assert stored(place) == [-3.0, -2.0, -1.0]
    with pytest.raises(ValueError, match="no row in quarantine"):
        job.batches(place.folder, None, view="income")


def test_when_no_row_is_mended_the_table_is_not_touched(place: job.Place) -> None:
    """The rows stay; no version is made for nothing."""
    still = job.Place(
        view=view(Range("amount", minimum=5)), batch=place.batch, folder=place.folder, target=place.target
    )
    event = job.replay(still, None, now=NOW)
    job.finish(still, event)
    assert (event.rows_stored, event.table_version) == (0, None)
    assert [reason for _, reason in left(place)] == ["amount outside 5.."] * 3
    assert not DeltaTable.is_deltatable(place.target.uri)


def test_a_replay_is_told_once_and_one_that_changed_nothing_not_at_all(tmp_path: Path) -> None:
    """A killed run is told by the next one; tried again without a fix there is nothing to tell."""
    ledger = open_ledger(PlatformConfig(storage=StorageConfig(root=str(tmp_path))))
    common: dict[str, Any] = {"view": "income", "view_version": "v"}
    ledger.append(
        BatchIngested(
            **common,
            ingest_id="b",
            source="",
            source_digest="",
            rows_in=9,
            rows_stored=7,
            rows_quarantined=2,
            table_version=1,
            reasons={"x": 2},
        ),
        actor="ann",
    )

    def replayed(replay_id: str, stored: int, **reasons: int) -> QuarantineReplayed:
        left = sum(reasons.values())
        version = 2 if stored else None
        return QuarantineReplayed(
            **common,
            batch="b",
            replay_id=replay_id,
            rows_in=stored + left,
            rows_stored=stored,
            rows_quarantined=left,
            reasons=reasons,
            table_version=version,
        )

    steps = [
        replayed("1", 0, x=2),
        replayed("1", 0, y=2),
        replayed("1", 1, y=1),
        replayed("1", 1, y=1),
        replayed("2", 0, y=1),
    ]
    told = []
    for step in steps:
        job.say(ledger, step, actor="ann")
        told.append(len(list(ledger.entries(QuarantineReplayed))))
    assert told == [0, 1, 2, 2, 2]
