"""Tests of compaction with kills, power cuts, and concurrent writers and readers."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from polars.testing import assert_frame_equal

from cluster.records import reading as reading_module
from cluster.records.reading import count_records, read_predictions, read_records
from cluster.records.segments import SegmentWriter, list_segments
from cluster.records.table import LogTable
from cluster.security.encryption.parquet import ProtectedFiles
from cluster.security.keys.keyring import Keyring
from tests.processes import forks
from tests.samples.record_log import PERSONAL, fill, ids, new_keyring, prediction, run

KILLS = int(os.environ.get("FALAJ_KILLS", "1"))
"""Number of killed processes, which take seconds to start. Every single step is broken in every run."""


class Killed(BaseException):
    """Simulates the end of the process. No code catches it."""


def kill_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Raise `Killed` in place of the process's n-th change of a file, counted from 0."""
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
    """Records which files were synced, and empties all others in a power cut."""

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


def test_segment_is_deleted_only_after_the_table_is_synced(
    log: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes commits, checkpoints and folders of a run that was killed before its sync."""
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
def test_kill_at_any_step_loses_and_doubles_nothing(tmp_path: Path, end: str) -> None:
    """Readers see every record once, and the next run leaves the same table as an uninterrupted one."""
    original = tmp_path / "original"
    keyring = new_keyring(tmp_path)
    fill(original / "predictions" / "m", keyring, segments=2, records=2)
    (original / "predictions" / "m" / "20200101T000000-a.new").touch()
    os.utime(original / "predictions" / "m" / "20200101T000000-a.new", (0, 0))
    expected = read_predictions(original / "predictions" / "m", keyring)
    step = 0
    while True:
        log = tmp_path / str(step) / "predictions" / "m"
        shutil.copytree(original, tmp_path / str(step))
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
        assert sum(commit.records for commit in LogTable(log).compactions().values()) == 4
        names = {path.relative_to(log / "table").as_posix() for path in (log / "table").glob("*/*")}
        assert names - {f for f in names if f.startswith("_delta_log")} == {
            f.path for f in LogTable(log).files
        }
        step += 1
    assert step > 12


def write_and_compact(root: str, first: int, sender: Connection) -> None:
    """Write segments and compact them until the process is killed; send the number of written records."""
    log, keyring = Path(root) / "predictions" / "m", Keyring(Path(root) / "keyring.json", bytes(32))
    sender.send(first)
    for number in range(first, 10**6, 4):
        fill(log, keyring, first=number, segments=2, records=2)
        sender.send(number + 4)
        run(log, keyring)


def test_kill_9_of_writers_and_compactions_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """After each kill and each compaction, every written record exists once."""
    log, keyring = tmp_path / "predictions" / "m", new_keyring(tmp_path)
    context = forks.context()
    written = 0
    for _ in range(KILLS):
        receiver, sender = context.Pipe()
        job = context.Process(target=write_and_compact, args=(str(tmp_path), written, sender))
        job.start()
        receiver.recv()
        job.join(random.uniform(0.0, 0.2))
        job.kill()
        job.join()
        acknowledged = written
        while receiver.poll():
            acknowledged = max(acknowledged, receiver.recv())
        stored_ids = ids(log, keyring)
        numbers = {int(stored[1:]) for stored in stored_ids}
        assert len(numbers) == len(stored_ids) == count_records(log)
        assert set(range(acknowledged)) <= numbers
        written = max(numbers, default=-1) + 1
        written += -written % 4
        SegmentWriter(log, store=keyring, key=PERSONAL).append(
            *(prediction(number) for number in set(range(written)) - numbers)
        )
    run(log, keyring)
    assert ids(log, keyring) == sorted(f"p{number}" for number in range(written))
    assert count_records(log) == written


def test_compaction_does_not_disturb_a_reader(tmp_path: Path) -> None:
    """At any position of the reader, it gets each record once."""
    keyring = new_keyring(tmp_path)
    for position in (0, 3, 6, 7, 9, 17):
        log = tmp_path / str(position) / "predictions" / "m"
        fill(log, keyring, segments=2, records=3)
        run(log, keyring)
        fill(log, keyring, first=6, segments=4, records=3)
        reader = read_records(log, keyring)
        read_ids = [next(reader)["prediction_id"] for _ in range(position)]
        run(log, keyring)
        read_ids += [record["prediction_id"] for record in reader]
        assert sorted(read_ids) == sorted(f"p{number}" for number in range(18))


def test_count_is_right_during_a_compaction(
    log: Path, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compaction runs before or after the table is opened."""
    fill(log, keyring)

    def before(_folder: str) -> LogTable:
        run(log, keyring)
        return LogTable(log)

    def after(_folder: str) -> LogTable:
        table = LogTable(log)
        run(log, keyring)
        return table

    for number, opened in enumerate((before, after), start=1):
        monkeypatch.setattr(reading_module, "LogTable", opened)
        assert count_records(log) == 12 * number
        fill(log, keyring, first=12 * number)
