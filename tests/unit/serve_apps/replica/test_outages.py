"""A request waits during a short outage of a database."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import ProgrammingError

from cluster.errors import InvalidRequest, OnlineStoreUnavailable
from cluster.ledger import Ledger
from cluster.records.blocks import Block, BlockWriter, read_blocks
from cluster.records.database import ensure_tables
from cluster.records.location import LogLocation
from cluster.settings import Durability
from serve_apps.replica import outages
from serve_apps.replica.edge_headers import EdgeHeaders
from serve_apps.replica.outages import OUTAGE_S, TREATMENT_S, Outages, wait_s
from tests.servers import postgresql
from tests.servers.object_store import object_store_environment
from tests.servers.replica import SharedState, running_replica
from tests.unit.serve_apps.replica.test_durability import BODY, PREDICT, VALUE


class Calls:
    """Fails a number of times, then returns the number of calls."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.count, self._failures, self._error = 0, failures, error
        self.failed_in: list[int] = []
        """The threads of the failed calls."""

    def __call__(self) -> int:
        self.count += 1
        if self.count <= self._failures:
            self.failed_in.append(threading.get_ident())
            raise self._error
        return self.count


AWAY = OnlineStoreUnavailable("Redis is down")
WRONG = ProgrammingError("SELECT", {}, Exception("no such table"))


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "PAUSE_S", 0.01)


async def call_during_outage(call: Callable[[], int], **options: Any) -> int:
    return await Outages().retry_during_outage(call, **options)


@pytest.mark.parametrize("in_thread", [False, True])
def test_call_is_repeated_until_the_database_answers(in_thread: bool) -> None:
    assert asyncio.run(call_during_outage(Calls(3, AWAY), in_thread=in_thread)) == 5


def test_long_outage_is_an_error() -> None:
    """The client gets 503 and not a timeout."""
    with pytest.raises(OnlineStoreUnavailable):
        asyncio.run(call_during_outage(Calls(10**6, AWAY), deadline=time.monotonic() + 0.1))


@pytest.mark.parametrize("error", [InvalidRequest("no such entity"), WRONG])
def test_errors_that_are_no_outage_are_not_repeated(error: Exception) -> None:
    """A database that refuses a statement refuses it again."""
    calls = Calls(1, error)
    with pytest.raises(type(error)):
        asyncio.run(call_during_outage(calls))
    assert calls.count == 1


def test_requests_wait_for_one_probe_in_a_thread() -> None:
    """Clients of Redis block. Otherwise 64 requests would block the event loop, and health checks would fail."""
    calls = Calls(6, AWAY)

    async def send() -> list[int]:
        waiting = Outages()
        return await asyncio.gather(*(waiting.retry_during_outage(calls) for _ in range(64)))

    assert len(asyncio.run(send())) == 64
    assert calls.count == 1 + 6 + 64  # the first request, the probe, then each request
    assert calls.failed_in.count(threading.get_ident()) == 1


def test_blocks_are_added_after_a_restart_of_the_database(tmp_path: Path) -> None:
    """PostgreSQL is killed and started again while a block waits. The block is there once."""
    with postgresql.server() as server:
        ledger = Ledger(server.address)
        ensure_tables(ledger)
        location = LogLocation(
            name="predictions/m", folder=tmp_path / "predictions" / "m", engine=ledger.engine
        )
        writer = BlockWriter(location)
        writer.add([Block("s", 0, b"first\n")])
        server.kill()

        async def restart_meanwhile() -> None:
            adding = asyncio.create_task(asyncio.to_thread(writer.add, [Block("s", 6, b"second\n")]))
            await asyncio.sleep(0.5)
            assert not adding.done()
            await asyncio.to_thread(server.start)
            await adding

        asyncio.run(restart_meanwhile())
        writer.close()
        assert read_blocks(ledger.engine, "predictions/m", "s") == b"first\nsecond\n"
        ledger.engine.dispose()


def test_predictions_wait_for_a_restart_of_postgresql(tmp_path: Path) -> None:
    """Requests of eight clients wait while the database is killed and started again. Each answer is in the log once."""
    with object_store_environment() as bucket, postgresql.server() as server:
        shared = SharedState(f"{bucket}/outage", server.address)
        with (
            running_replica(tmp_path, VALUE, durability=Durability.shared, shared=shared) as replica,
            ThreadPoolExecutor(8) as clients,
        ):
            answers = [replica.json(PREDICT, BODY)]
            server.kill()
            waiting = [clients.submit(replica.json, PREDICT, BODY) for _ in range(16)]
            time.sleep(1.0)
            assert not any(one.done() for one in waiting)
            server.start()
            answers += [one.result() for one in waiting]
            assert {status for status, _ in answers} == {200}
            ids = [content["prediction_id"] for _, content in answers]
            assert sorted(replica.log()["prediction_id"]) == sorted(ids)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (EdgeHeaders().variant, OUTAGE_S),
        (EdgeHeaders(variant="champion", arm="treatment").variant, OUTAGE_S),
        (EdgeHeaders(variant="predecessor", arm="control").variant, TREATMENT_S),
        (EdgeHeaders(variant="challenger", arm="treatment").variant, TREATMENT_S),
    ],
)
def test_only_a_version_with_a_fallback_waits_for_less(variant: str, expected: float) -> None:
    """After a promotion, the champion answers the arm treatment, and the predecessor answers control."""
    assert wait_s(variant) == expected
