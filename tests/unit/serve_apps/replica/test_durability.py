"""Durability: a record is on the disk before its answer is sent, or the answer is 503."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.records.reading import count_records, read_outcomes
from cluster.records.schema import OutcomeRecord
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.security.keys.access import key_store
from cluster.security.keys.keyring import Keyring
from cluster.security.keys.store import KeyInfo
from cluster.settings import Durability
from serve_apps.replica.http import Unavailable
from serve_apps.replica.http_contract import TRY_ANOTHER
from serve_apps.replica.record_log import RecordLog
from tests.servers.replica import MODEL, running_replica
from tests.servers.small_disk import fill_disk, mounted_small_disk

KEY = "outcomes/m/sensitive"
VALUE = ModelSignature(task=Task.regression, inputs=(InputSpec(name="age", dtype="double"),), label="y")
BODY = {"entities": [{"id": 1}], "features": {"age": 3}}
PREDICT, OUTCOMES = "/v1/models/m:predict", "/v1/outcomes"


def outcome(number: int) -> OutcomeRecord:
    moment = "2026-01-01T00:00:00+00:00"
    return OutcomeRecord(prediction_id=str(number), outcome=number, observed_at=moment, received_at=moment)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    keyring = Keyring.create(tmp_path / "keyring.json", bytes(32))
    keyring.ensure(KeyInfo(name=KEY))
    return keyring


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outcomes" / "m"


def is_locked(path: Path) -> bool:
    """Return whether a process writes a segment."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def open_log(folder: Path, keyring: Keyring) -> RecordLog:
    return RecordLog(folder, store=keyring, key=KEY, durability=Durability.disk)


class Disk:
    """An `os.fdatasync` that records its calls, waits until it may return, and fails on command."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.entered = threading.Semaphore(0)
        self.may_return = threading.Semaphore(0)
        self.failures = 0
        """Number of calls that will fail."""

    def __call__(self, descriptor: int) -> None:
        self.events.append(("begins", 0))
        self.entered.release()
        assert self.may_return.acquire(timeout=10)
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.events.append(("ends", 0))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    disk.may_return.release()  # for the start of the first segment
    monkeypatch.setattr(os, "fdatasync", disk)
    return disk


async def ask(log: RecordLog, disk: Disk, number: int) -> int:
    log.append(outcome(number))
    disk.events.append(("append", number))
    answer = await log.after_durable(number)
    disk.events.append(("answer", number))
    return answer


def test_answer_waits_for_a_sync_that_began_after_its_record(
    folder: Path, keyring: Keyring, disk: Disk
) -> None:
    """Forty requests during two syncs need two syncs in all, not forty."""
    log = open_log(folder, keyring)
    assert disk.entered.acquire(timeout=10)
    disk.events.clear()

    async def run() -> list[int]:
        requests = [asyncio.create_task(ask(log, disk, 0))]
        for batch in range(2):
            assert await asyncio.to_thread(disk.entered.acquire, timeout=10)
            requests += [asyncio.create_task(ask(log, disk, 1 + batch * 20 + n)) for n in range(20)]
            await asyncio.sleep(0)
            assert not any(request.done() for request in requests[-20:])
            disk.may_return.release()
        disk.may_return.release()
        return list(await asyncio.gather(*requests))

    assert asyncio.run(run()) == list(range(41))
    assert sum(what == "begins" for what, _ in disk.events) == 3
    for number in range(41):
        appended, answered = (disk.events.index((what, number)) for what in ("append", "answer"))
        between = [what for what, _ in disk.events[appended:answered]]
        assert "ends" in between[between.index("begins") :]
    log.close()


def test_failed_sync_fails_all_waiting_requests_and_starts_a_segment(
    folder: Path, keyring: Keyring, disk: Disk
) -> None:
    """The kernel may have dropped the data, so later syncs of that file prove nothing."""
    log = open_log(folder, keyring)
    disk.may_return.release(100)

    async def run(*numbers: int) -> list[Any]:
        return await asyncio.gather(*(ask(log, disk, n) for n in numbers), return_exceptions=True)

    disk.failures = 1
    failures = asyncio.run(run(1, 2, 3))
    assert [type(error) for error in failures] == [Unavailable] * 3
    assert asyncio.run(run(4, 5)) == [4, 5]
    log.close()
    assert len(list(folder.iterdir())) == 2
    assert set(read_outcomes(folder, keyring)["prediction_id"]) >= {"4", "5"}


def test_failed_sync_fails_requests_that_came_during_it(folder: Path, keyring: Keyring, disk: Disk) -> None:
    """A second sync would succeed and prove nothing."""
    log = open_log(folder, keyring)
    assert disk.entered.acquire(timeout=10)

    async def run() -> list[Any]:
        first = asyncio.create_task(ask(log, disk, 1))
        assert await asyncio.to_thread(disk.entered.acquire, timeout=10)
        second = asyncio.create_task(ask(log, disk, 2))
        await asyncio.sleep(0)
        disk.failures = 1
        disk.may_return.release(10)
        failed = await asyncio.gather(first, second, return_exceptions=True)
        return [*failed, await ask(log, disk, 3)]

    *failed, last = asyncio.run(run())
    assert ([type(error) for error in failed], last) == ([Unavailable] * 2, 3)
    log.close()
    assert len(list(folder.iterdir())) == 2


def test_old_segment_is_synced_before_its_answers(folder: Path, keyring: Keyring) -> None:
    """Then the segment is released."""
    log = open_log(folder, keyring)
    log._writer._max_bytes = 1
    synced: list[str] = []
    real = os.fdatasync

    def sync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    async def run() -> None:
        for number in range(3):
            log.append(outcome(number))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fdatasync", sync)
            await log.after_durable(None)

    asyncio.run(run())
    assert set(synced) >= {str(path) for path in folder.iterdir()}
    assert not log._writer._unsynced
    log.close()
    assert count_records(folder) == 3


@pytest.mark.parametrize("durability", [Durability.process, Durability.disk])
def test_idle_replica_releases_an_old_segment(folder: Path, keyring: Keyring, durability: Durability) -> None:
    """The next record starts a new segment."""
    log = RecordLog(folder, store=keyring, key=KEY, durability=durability, max_age_s=0.01)

    async def run() -> None:
        for number in range(2):
            log.append(outcome(number))
            await log.after_durable(None)
            deadline = time.monotonic() + 10
            while is_locked(log._writer.path):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.005)

    asyncio.run(run())
    assert len(list(folder.iterdir())) == count_records(folder) == 2
    log.close()


def test_replica_answers_after_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both endpoints and outcomes; requests that write nothing do not wait."""
    with (
        running_replica(tmp_path, VALUE, durability=Durability.disk) as replica,
        ThreadPoolExecutor(1) as client,
    ):
        infer = {"inputs": [{"name": "age", "datatype": "FP64", "shape": [1], "data": [3.0]}]}
        prediction_id = replica.json(PREDICT, BODY)[1]["prediction_id"]
        outcomes_body = {"model": MODEL, "outcomes": [{"prediction_id": prediction_id, "outcome": 1}]}
        assert replica.at_outcomes.json(OUTCOMES, outcomes_body)[0] == 200  # this opens the log
        disk = Disk()
        monkeypatch.setattr(os, "fdatasync", disk)
        for ask in (
            lambda: replica.json(PREDICT, BODY),
            lambda: replica.json("/v2/models/m/infer", infer),
            lambda: replica.at_outcomes.json(OUTCOMES, outcomes_body),
        ):
            answer = client.submit(ask)
            assert disk.entered.acquire(timeout=10)
            assert replica.json("/v2/models/m")[0] == 200
            assert not answer.done()
            disk.may_return.release()
            assert answer.result(timeout=10)[0] == 200
        monkeypatch.undo()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_small_disk(tmp_path / "small_disk") as folder:
        yield folder


def test_full_disk_is_503_and_loses_no_answered_record(small_disk: Path) -> None:
    """Predictions and outcomes; the service continues when there is space again."""
    with running_replica(small_disk, VALUE, durability=Durability.disk) as replica:
        answered = []

        def predict_and_post_outcome() -> set[int]:
            status, headers, body = replica.call(PREDICT, BODY)
            content = json.loads(body)
            answered.extend([content["prediction_id"]] if status == 200 else [])
            if status != 200:
                assert "cannot be written" in content["error"]
                assert (content["code"], headers["retry-after"]) == (503, "1")
            outcomes_body = {
                "model": MODEL,
                "outcomes": [{"prediction_id": answered[0], "outcome": len(answered)}],
            }
            return {status, replica.at_outcomes.json(OUTCOMES, outcomes_body)[0]}

        assert predict_and_post_outcome() == {200}
        fill_disk(small_disk / "filler")
        while (statuses := predict_and_post_outcome()) != {TRY_ANOTHER}:  # space in the last pages
            assert statuses <= {200, TRY_ANOTHER}
        assert predict_and_post_outcome() == {TRY_ANOTHER}
        (small_disk / "filler").unlink()
        assert predict_and_post_outcome() == {200}
        assert replica.log()["prediction_id"].to_list() == answered
        outcomes = read_outcomes(Path(replica.places.outcomes(MODEL)), key_store(replica.keys))
        assert outcomes["outcome"].to_list() == [len(answered)]
