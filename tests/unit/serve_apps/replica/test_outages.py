"""A request outlasts a short outage of a database."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import InvalidRequest, OnlineStoreUnavailable
from cluster.ledger import Ledger
from cluster.records.blocks import Block, BlockWriter, read_blocks
from cluster.records.database import ensure_tables
from cluster.records.location import LogLocation
from cluster.settings import Durability
from serve_apps.replica import outages
from serve_apps.replica.outages import outlast
from tests.servers import postgresql
from tests.servers.object_store import object_store_environment
from tests.servers.replica import SharedState, running_replica
from tests.unit.serve_apps.replica.test_durability import BODY, PREDICT, VALUE


class Calls:
    """Fails a number of times, then returns the number of calls."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.count, self._failures, self._error = 0, failures, error

    async def __call__(self) -> int:
        self.count += 1
        if self.count <= self._failures:
            raise self._error
        return self.count


@pytest.fixture(autouse=True)
def short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "PAUSE_S", 0.01)


def test_call_is_repeated_until_the_database_answers() -> None:
    assert asyncio.run(outlast(Calls(3, OnlineStoreUnavailable("Redis is down")))) == 4


def test_long_outage_is_an_error() -> None:
    """The client gets 503 and not a timeout."""
    with pytest.raises(OnlineStoreUnavailable):
        asyncio.run(outlast(Calls(10**6, OnlineStoreUnavailable("Redis is down")), longest_s=0.1))


def test_other_errors_are_not_repeated() -> None:
    calls = Calls(1, InvalidRequest("no such entity"))
    with pytest.raises(InvalidRequest):
        asyncio.run(outlast(calls))
    assert calls.count == 1


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


def test_predictions_outlast_a_restart_of_postgresql(tmp_path: Path) -> None:
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
