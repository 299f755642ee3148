"""Compacting a log: the same records before and after, each once, whoever reads or writes and whenever it is killed."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import random
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from cluster.errors import CommitConflict, RecordLogCorrupt
from cluster.records import (
    OutcomeRecord,
    PredictionRecord,
    SegmentWriter,
    count_records,
    read_outcomes,
    read_predictions,
    read_records,
)
from cluster.records import reading as reading_module
from cluster.records.columns import to_record, to_row
from cluster.records.compaction import LOCK, compact
from cluster.records.segments import list_segments
from cluster.records.table import LogTable
from cluster.security.encryption.parquet import ProtectedFileCorrupt, ProtectedFiles
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo, KeyRevoked
from tests import forks

KILLS = int(os.environ.get("FALAJ_KILLS", "1"))
"""Of real processes, which take seconds to start; every single step of one is broken in every run."""
PERSONAL, SENSITIVE, OUTCOMES = "predictions/m/personal", "predictions/m/sensitive", "outcomes/m/sensitive"
MOMENT = "2026-01-02T03:04:05.000006+00:00"


def prediction(number: int, *, version: int = 1, **changes: Any) -> PredictionRecord:
    """Versions have other inputs, and their labels other types."""
    features = {"age": [41.5, None]} if version == 1 else {"city": ["a", "b"]}
    record = PredictionRecord(
        prediction_id=f"p{number}",
        request_id=f"r{number}",
        time=MOMENT,
        model="m",
        version=version,
        variant="champion",
        rollout="",
        arm="outside",
        unit_hash="",
        as_of="0001-01-01T00:00:00+00:00",
        entities=[{"id": 1}, {"id": "two"}],
        features=features,
        predictions=[{"probability": 0.25, "label": "no"}, {"probability": 0.75, "label": "yes"}],
        given=["age"],
    )
    return dataclasses.replace(record, **changes)


def outcome(number: int, value: Any, received_at: str = MOMENT, row: int = 0) -> OutcomeRecord:
    return OutcomeRecord(
        prediction_id=f"p{number}", row=row, outcome=value, observed_at=MOMENT, received_at=received_at
    )


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return new_keyring(tmp_path)


def new_keyring(root: Path) -> Keyring:
    keyring = Keyring.create(root / "keyring.json", bytes(32))
    for name in (PERSONAL, SENSITIVE, OUTCOMES):
        keyring.ensure(KeyInfo(name=name))
    return keyring


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "predictions" / "m"


def fill(log: Path, keyring: Keyring, *, first: int = 0, segments: int = 3, records: int = 4) -> None:
    """Segments whose writers have ended, of two versions and two classes."""
    number = first
    for segment in range(segments):
        writer = SegmentWriter(log, store=keyring, key=SENSITIVE if segment % 2 else PERSONAL)
        for _ in range(records):
            writer.append(prediction(number, version=1 + segment % 2))
            number += 1
        writer.close()


def run(log: Path, keyring: Keyring) -> int:
    return compact(log, store=keyring, files=ProtectedFiles(keyring))


def ids(log: Path, keyring: Keyring) -> list[str]:
    return sorted(record["prediction_id"] for record in read_records(log, keyring))


def test_what_was_compacted_reads_as_before(log: Path, keyring: Keyring) -> None:
    """Frames, records and counts, of versions with other inputs and keys of two classes; the segments are gone."""
    fill(log, keyring)
    frame, records = read_predictions(log, keyring), sorted(read_records(log, keyring), key=str)
    assert run(log, keyring) == 3
    assert run(log, keyring) == 0
    assert list_segments(log) == []
    assert_frame_equal(read_predictions(log, keyring), frame)
    assert sorted(read_records(log, keyring), key=lambda one: one["prediction_id"]) == sorted(
        records, key=lambda one: one["prediction_id"]
    )
    assert count_records(log) == 12
    fill(log, keyring, first=12)
    assert ids(log, keyring) == sorted(f"p{number}" for number in range(24))
    assert count_records(log) == 24


def test_a_segment_that_is_written_is_left_alone(log: Path, keyring: Keyring) -> None:
    """What its writer has left for a new one is taken, and the writer goes on."""
    writer = SegmentWriter(log, store=keyring, key=PERSONAL, max_bytes=1)
    for number in range(3):
        writer.append(prediction(number))
    assert run(log, keyring) == 2
    assert list_segments(log) == [writer.path]
    writer.append(prediction(3))
    assert run(log, keyring) == 1
    assert ids(log, keyring) == ["p0", "p1", "p2", "p3"]
    assert count_records(log) == 4


def test_a_segment_without_a_record_is_removed(log: Path, keyring: Keyring) -> None:
    """Its writer was killed before its first one, or before the first line was whole."""
    SegmentWriter(log, store=keyring, key=PERSONAL).close()
    SegmentWriter(log, store=keyring, key=PERSONAL).close()
    list_segments(log)[0].write_bytes(b"{")
    assert run(log, keyring) == 2
    assert (list_segments(log), count_records(log), LogTable(log).files) == ([], 0, ())


def test_there_is_nothing_to_compact_without_a_log(log: Path, keyring: Keyring) -> None:
    """A model that was never asked."""
    assert run(log, keyring) == 0
    assert not log.exists()


def test_two_compactions_at_once_are_refused(log: Path, keyring: Keyring) -> None:
    """The second says so and changes nothing."""
    fill(log, keyring)
    with (log / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CommitConflict, match="Another compaction"):
            run(log, keyring)
    assert run(log, keyring) == 3


def test_what_was_taken_before_a_checkpoint_of_the_table_stays_taken(log: Path, keyring: Keyring) -> None:
    """Delta writes one every hundred commits, and reads no older commit from then on."""
    fill(log, keyring, segments=2, records=2)
    stems = [path.stem for path in list_segments(log)]
    run(log, keyring)
    DeltaTable(str(log / "table")).create_checkpoint()
    (log / "table" / "_delta_log" / f"{0:020}.json").unlink()
    for number in (4, 8):
        fill(log, keyring, first=number, segments=2, records=2)
        assert run(log, keyring) == 2
    assert all(LogTable(log).has(stem) for stem in stems)
    assert len(ids(log, keyring)) == count_records(log) == 12


@pytest.mark.parametrize("lost", ["folder", "commits", "first commit", "last commit"])
def test_files_whose_table_is_lost_are_never_taken_for_leftovers(
    log: Path, keyring: Keyring, lost: str
) -> None:
    """Half a restore, say: their records are nowhere else. Whoever counts or reads hears of it, too."""
    fill(log, keyring)
    run(log, keyring)
    fill(log, keyring, first=12)
    history = log / "table" / "_delta_log"
    kept = log.with_name("kept")
    shutil.copytree(history, kept)
    match lost:
        case "folder":
            shutil.rmtree(history)
        case "commits":
            shutil.rmtree(history)
            history.mkdir()
        case _:
            (history / f"{0 if lost == 'first commit' else 1:020}.json").unlink()
    before = set(log.rglob("*"))
    with pytest.raises(RecordLogCorrupt, match=r"Restore .*_delta_log from a backup"):
        run(log, keyring)
    if lost != "last commit":  # without it the table is an older one, and whole
        with pytest.raises(RecordLogCorrupt, match="cannot be read"):
            count_records(log)
        with pytest.raises(RecordLogCorrupt, match="cannot be read"):
            ids(log, keyring)
    assert set(log.rglob("*")) - {log / LOCK} == before - {log / LOCK}
    shutil.copytree(kept, history, dirs_exist_ok=True)
    assert run(log, keyring) == 3
    assert ids(log, keyring) == sorted(f"p{number}" for number in range(24))


class Killed(BaseException):
    """Nobody catches it."""


def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Have the process end before the n-th change that it makes, which is right after the one before."""
    steps = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            if steps == step:
                raise Killed
            steps += 1
            return function(*args, **kwargs)

        return call

    patch.setattr(ProtectedFiles, "write", counted(ProtectedFiles.write))
    patch.setattr(DeltaTable, "create", counted(DeltaTable.create))
    patch.setattr(DeltaTable, "create_write_transaction", counted(DeltaTable.create_write_transaction))
    patch.setattr(os, "fsync", counted(os.fsync))
    patch.setattr(Path, "rename", counted(Path.rename))
    patch.setattr(Path, "unlink", counted(Path.unlink))


class Disk:
    """Knows what was synced, and forgets all else in a power cut."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._synced: set[int] = set()
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            fsync(descriptor)
            self._synced.add(os.fstat(descriptor).st_ino)

        patch.setattr(os, "fsync", noted)

    def unsynced(self, folder: Path) -> list[Path]:
        return [path for path in sorted(folder.rglob("*")) if path.stat().st_ino not in self._synced]

    def lose_power(self, log: Path) -> None:
        for path in (*self.unsynced(log / "table"), *self.unsynced(log / "table.new")):
            if path.is_file():
                path.write_bytes(b"")


def test_a_segment_goes_only_when_all_that_says_what_became_of_it_is_on_the_disk(
    log: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every commit and checkpoint and their folders, also those of a run that was killed before it synced them."""
    disk, unlink = Disk(monkeypatch), Path.unlink
    unsynced: list[Path] = []

    def noted(path: Path, missing_ok: bool = False) -> None:
        unsynced.extend(disk.unsynced(log / "table"))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    fill(log, keyring)
    run(log, keyring)
    assert unsynced == []
    fill(log, keyring, first=12)
    with monkeypatch.context() as patch:
        patch.setattr(LogTable, "sync", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(log, keyring)
    DeltaTable(str(log / "table")).create_checkpoint()
    assert disk.unsynced(log / "table") != []
    assert run(log, keyring) == 3
    assert unsynced == []


@pytest.mark.parametrize("end", ["kill -9", "power cut"])
def test_killed_at_any_step_nothing_is_lost_or_doubled(tmp_path: Path, end: str) -> None:
    """Readers see every record once at once, and the next run leaves the very table of an unbroken one."""
    whole = tmp_path / "whole"
    keyring = new_keyring(tmp_path)
    fill(whole / "predictions" / "m", keyring, segments=2, records=2)
    (whole / "predictions" / "m" / "20200101T000000-a.new").touch()
    os.utime(whole / "predictions" / "m" / "20200101T000000-a.new", (0, 0))
    expected = read_predictions(whole / "predictions" / "m", keyring)
    step = 0
    while True:
        log = tmp_path / str(step) / "predictions" / "m"
        shutil.copytree(whole, tmp_path / str(step))
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch)
            kill_at(step, patch)
            try:
                run(log, keyring)
                break
            except Killed:
                pass
        if end == "power cut":
            disk.lose_power(log)
        assert_frame_equal(read_predictions(log, keyring), expected)
        assert count_records(log) == 4
        run(log, keyring)
        assert_frame_equal(read_predictions(log, keyring), expected)
        assert (count_records(log), list_segments(log)) == (4, [])
        assert sum(one.records for one in LogTable(log).compactions().values()) == 4
        kept = {path.relative_to(log / "table").as_posix() for path in (log / "table").glob("*/*")}
        assert kept - {f for f in kept if f.startswith("_delta_log")} == {f.path for f in LogTable(log).files}
        step += 1
    assert step > 12


def write_and_compact(root: str, first: int, began: Connection) -> None:
    """Segments and compactions one after another, until it is killed; says how many records were written."""
    log, keyring = Path(root) / "predictions" / "m", Keyring(Path(root) / "keyring.json", bytes(32))
    began.send(first)
    for number in range(first, 10**6, 4):
        fill(log, keyring, first=number, segments=2, records=2)
        began.send(number + 4)
        run(log, keyring)


def test_kill_9_of_writers_and_compactions_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """As many records as were written are there after every kill, each once, and still after the next compaction."""
    log, keyring = tmp_path / "predictions" / "m", new_keyring(tmp_path)
    context = forks.context()
    written = 0
    for _ in range(KILLS):
        here, there = context.Pipe()
        job = context.Process(target=write_and_compact, args=(str(tmp_path), written, there))
        job.start()
        here.recv()
        job.join(random.uniform(0.0, 0.2))
        job.kill()
        job.join()
        acknowledged = written
        while here.poll():
            acknowledged = max(acknowledged, here.recv())
        found = ids(log, keyring)
        numbers = {int(one[1:]) for one in found}
        assert len(numbers) == len(found) == count_records(log)
        assert set(range(acknowledged)) <= numbers
        written = max(numbers, default=-1) + 1
        written += -written % 4
        SegmentWriter(log, store=keyring, key=PERSONAL).append(
            *(prediction(number) for number in set(range(written)) - numbers)
        )
    run(log, keyring)
    assert ids(log, keyring) == sorted(f"p{number}" for number in range(written))
    assert count_records(log) == written


def test_a_compaction_beside_a_reader_changes_nothing_for_it(tmp_path: Path) -> None:
    """Wherever the reader is, of a log that lies half in the table already: it gets each record once."""
    keyring = new_keyring(tmp_path)
    for place in (0, 3, 6, 7, 9, 17):
        log = tmp_path / str(place) / "predictions" / "m"
        fill(log, keyring, segments=2, records=3)
        run(log, keyring)
        fill(log, keyring, first=6, segments=4, records=3)
        reader = read_records(log, keyring)
        found = [next(reader)["prediction_id"] for _ in range(place)]
        run(log, keyring)
        found += [record["prediction_id"] for record in reader]
        assert sorted(found) == sorted(f"p{number}" for number in range(18))


def test_records_are_counted_once_beside_a_compaction(
    log: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it comes before the table is opened or after."""
    fill(log, keyring)

    def before(folder: Path) -> LogTable:
        run(folder, keyring)
        return LogTable(folder)

    def after(folder: Path) -> LogTable:
        table = LogTable(folder)
        run(folder, keyring)
        return table

    for number, opened in enumerate((before, after), start=1):
        monkeypatch.setattr(reading_module, "LogTable", opened)
        assert count_records(log) == 12 * number
        fill(log, keyring, first=12 * number)


def test_a_segment_that_somebody_deletes_is_missed(log: Path, keyring: Keyring) -> None:
    """It is in no table."""
    fill(log, keyring)
    reader = read_records(log, keyring)
    next(reader)
    list_segments(log)[2].unlink()
    with pytest.raises(RecordLogCorrupt, match="was deleted"):
        list(reader)


def test_an_altered_segment_is_not_taken(log: Path, keyring: Keyring) -> None:
    """It stays where it is, and so do all others."""
    fill(log, keyring)
    path = list_segments(log)[1]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\nAAAA\n", 1))
    with pytest.raises(RecordLogCorrupt, match=path.name):
        run(log, keyring)
    assert len(list_segments(log)) == 3
    assert LogTable(log).files == ()


def test_nothing_of_a_record_lies_in_the_clear_in_the_table(log: Path, keyring: Keyring) -> None:
    """Only where records stood; each file under the key of its segments."""
    fill(log, keyring)
    run(log, keyring)
    files = ProtectedFiles(keyring)
    assert {file.column_class for file in LogTable(log).files} == {"personal", "sensitive"}
    for file in LogTable(log).files:
        path = log / "table" / file.path
        content = path.read_bytes()
        for word in (b"champion", b"probability", b"outside"):
            assert word not in content
        keys = files.keys(str(path)).columns
        assert {name for name, key in keys.items() if key is None} == {"segment", "line"}
        assert {key for key in keys.values() if key} == {f"predictions/m/{file.column_class}"}
        assert pq.ParquetFile(path).read(["line"]).num_rows == file.records


def test_a_file_of_the_table_in_the_place_of_another_is_refused(log: Path, keyring: Keyring) -> None:
    """Of the same table, or of another log."""
    fill(log, keyring)
    run(log, keyring)
    one, other = (log / "table" / file.path for file in LogTable(log).files)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(ProtectedFileCorrupt):
        read_predictions(log, keyring)
    one.write_bytes(content)
    moved = log.parent / "other"
    log.rename(moved)
    with pytest.raises(ProtectedFileCorrupt):
        read_predictions(moved, keyring)


def test_a_revoked_key_closes_the_table_too(log: Path, keyring: Keyring) -> None:
    """Its records stay countable."""
    fill(log, keyring)
    run(log, keyring)
    keyring.revoke(PERSONAL)
    with pytest.raises(KeyRevoked):
        read_predictions(log, keyring)
    assert count_records(log) == 12


LATER = "2026-01-03T00:00:00+00:00"


def post(log: Path, keyring: Keyring, *records: OutcomeRecord) -> None:
    """As one request to a replica that ends after it."""
    writer = SegmentWriter(log, store=keyring, key=OUTCOMES)
    writer.append(*records)
    writer.close()


@pytest.mark.parametrize("compacted", range(8), ids="compacted after {:03b}".format)
def test_outcomes_count_late_twice_and_before_their_prediction_is_compacted(
    tmp_path: Path, keyring: Keyring, compacted: int
) -> None:
    """Whatever was compacted when: by prediction and row the one received last, whichever was written last."""
    log, outcomes = tmp_path / "predictions" / "m", tmp_path / "outcomes" / "m"
    steps: list[Callable[[], None]] = [
        lambda: post(outcomes, keyring, outcome(0, "no"), outcome(1, "no", LATER), outcome(1, "yes", row=1)),
        lambda: post(outcomes, keyring, outcome(0, "yes", LATER), outcome(1, "yes")),
        lambda: post(outcomes, keyring, outcome(0, "yes", LATER), outcome(9, 1.5), outcome(77, "of nothing")),
    ]
    for number, step in enumerate(steps):
        step()
        if number == 1:
            fill(log, keyring)
        if compacted >> number & 1:
            run(log, keyring)
            run(outcomes, keyring)
    known = read_outcomes(outcomes, keyring)
    joined = read_predictions(log, keyring).join(known, on=["prediction_id", "row"], how="inner")
    found = joined.sort("prediction_id", "row").select("prediction_id", "row", "outcome")
    assert found.rows() == [("p0", 0, "yes"), ("p1", 0, "no"), ("p1", 1, "yes"), ("p9", 0, 1.5)]
    assert count_records(outcomes) == 8


def test_of_two_outcomes_received_in_one_instant_the_one_written_last_counts(
    tmp_path: Path, keyring: Keyring
) -> None:
    """Compacted or not."""
    outcomes = tmp_path / "outcomes" / "m"
    post(outcomes, keyring, outcome(1, "no"), outcome(1, "yes"))
    for _ in range(2):
        assert read_outcomes(outcomes, keyring)["outcome"].to_list() == ["yes"]
        run(outcomes, keyring)


moments = st.datetimes(timezones=st.none()).map(lambda one: f"{one.isoformat()}+00:00")
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
).filter(lambda one: "inf" not in repr(one))
names = st.sampled_from(
    ["prediction_id", "time", "version", "row", "outcome", "features", "given", "arm", "later"]
)


@given(st.dictionaries(names, moments | values), st.sampled_from(["predictions", "outcomes"]))
def test_a_record_is_the_same_after_it_was_a_row(record: dict[str, Any], kind: str) -> None:
    """Whatever a later or an earlier release wrote: what fits no column is kept beside them."""
    assert to_record(kind, to_row(kind, "s", 0, record)) == record
