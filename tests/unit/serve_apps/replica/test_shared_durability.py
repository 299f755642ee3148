"""Durability `shared`: a record is in the ledger's database before its answer is sent, or the answer is 503."""

from __future__ import annotations

import asyncio
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.errors import ConfigError
from cluster.records.blocks import Block, BlockWriter, segment_sizes
from cluster.records.location import LogLocation, prediction_log
from cluster.records.reading import count_records, read_predictions
from cluster.records.upload import Uploader
from cluster.security.keys.access import key_store
from cluster.settings import Durability, LedgerConfig, PlatformConfig, ReplicaConfig, StorageConfig
from cluster.storage import Layout, check_durability
from serve_apps.replica.http import Unavailable
from serve_apps.replica.http_contract import TRY_ANOTHER
from serve_apps.replica.record_log import RecordLog
from tests.samples.record_log import PERSONAL, new_keyring, prediction
from tests.servers.object_store import object_store_environment
from tests.servers.postgresql import new_database
from tests.servers.replica import MODEL, SharedState, running_replica
from tests.unit.serve_apps.replica.test_durability import BODY, OUTCOMES, PREDICT, VALUE


@pytest.fixture(scope="module")
def servers(server: str) -> Iterator[tuple[str, str]]:
    """Bucket of the object store, and address of the database server."""
    with object_store_environment() as bucket:
        yield bucket, server


@pytest.fixture
def shared(servers: tuple[str, str]) -> SharedState:
    bucket, address = servers
    name = f"d{uuid.uuid4().hex}"
    return SharedState(f"{bucket}/{name}", new_database(address, name))


def test_deleted_node_has_all_its_answers_in_the_log(shared: SharedState, tmp_path: Path) -> None:
    """Its folder is deleted while it serves; it goes on, and another node reads and uploads all its records."""
    folder, elsewhere = tmp_path / "node", tmp_path / "other"
    with running_replica(folder, VALUE, durability=Durability.shared, shared=shared) as replica:

        def predict(_: int) -> tuple[int, str]:
            status, content = replica.json(PREDICT, BODY)
            return status, content.get("prediction_id", "")

        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(predict, range(40)))
            shutil.rmtree(folder / "predictions")
            answers += clients.map(predict, range(40))
        assert {status for status, _ in answers} == {200}
        ids = {prediction_id for _, prediction_id in answers}
        body = {"model": MODEL, "outcomes": [{"prediction_id": min(ids), "outcome": 1}]}
        assert replica.at_outcomes.json(OUTCOMES, body)[0] == 200
        assert set(segment_sizes(replica.ledger.engine, f"outcomes/{MODEL}"))
        other = Layout(shared.root, str(elsewhere))
        log, store = prediction_log(other, replica.ledger, MODEL), key_store(replica.keys)
        assert set(read_predictions(log, store)["prediction_id"]) == ids
        with replica.ledger.engine.connect() as connection:
            [(num_blocks,)] = connection.exec_driver_sql("SELECT count(*) FROM log_blocks")
        assert num_blocks < len(ids)  # concurrent requests share a transaction
        assert Uploader(other, replica.ledger, silent_s=0).run_once().failures == []
        assert segment_sizes(replica.ledger.engine, log.name) == {}
        assert set(read_predictions(log, store)["prediction_id"]) == ids
        assert predict(0)[0] == TRY_ANOTHER  # its segment was ended elsewhere
        assert predict(0)[0] == 200


class Database:
    """A `BlockWriter` that records what it adds, waits until it may return, and fails on command."""

    def __init__(self) -> None:
        self.added: list[Sequence[Block]] = []
        self.entered, self.may_return = threading.Semaphore(0), threading.Semaphore(0)
        self.failures, self.failed = 0, threading.Semaphore(0)

    def add(self, blocks: Sequence[Block]) -> None:
        self.entered.release()
        assert self.may_return.acquire(timeout=10)
        if self.failures:
            self.failures -= 1
            self.failed.release()
            raise OSError("the database does not answer")
        self.added.append(blocks)

    def abandon(self) -> None:
        """Let the call of `add` that waits fail, and not a later call."""
        self.failures += 1
        self.may_return.release()
        assert self.failed.acquire(timeout=10)

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    database = Database()
    monkeypatch.setattr("serve_apps.replica.record_log.BlockWriter", lambda _: database)
    return database


@pytest.fixture
def log(tmp_path: Path, database: Database) -> RecordLog:
    location = LogLocation(name="predictions/m", folder=tmp_path / "predictions" / "m")
    return RecordLog(location, store=new_keyring(tmp_path), key=PERSONAL, durability=Durability.shared)


async def ask(log: RecordLog, number: int) -> int:
    log.append(prediction(number))
    return await log.after_durable(number)


def test_answer_waits_for_a_transaction_that_began_after_its_record(
    log: RecordLog, database: Database, tmp_path: Path
) -> None:
    """Twenty requests during a transaction need one more, and the blocks together are the file."""

    async def run() -> list[int]:
        requests = [asyncio.create_task(ask(log, 0))]
        assert await asyncio.to_thread(database.entered.acquire, timeout=10)
        requests += [asyncio.create_task(ask(log, 1 + number)) for number in range(20)]
        await asyncio.sleep(0)
        assert not any(request.done() for request in requests)
        database.may_return.release(2)
        return list(await asyncio.gather(*requests))

    assert asyncio.run(run()) == list(range(21))
    [(first,), (second,)] = database.added
    assert (first.start, second.start) == (0, len(first.content))
    [path] = (tmp_path / "predictions" / "m").iterdir()
    assert path.read_bytes() == first.content + second.content
    log.close()


def test_failed_transaction_fails_all_waiting_requests_and_starts_a_segment(
    log: RecordLog, database: Database, tmp_path: Path
) -> None:
    """Nobody knows whether the database has the records. The next block is the beginning of another segment."""

    async def run() -> list[Any]:
        first = asyncio.create_task(ask(log, 0))
        assert await asyncio.to_thread(database.entered.acquire, timeout=10)
        second = asyncio.create_task(ask(log, 1))
        await asyncio.sleep(0)
        database.failures = 1
        database.may_return.release(2)
        failed = await asyncio.gather(first, second, return_exceptions=True)
        return [*failed, await ask(log, 2)]

    *failed, last = asyncio.run(run())
    assert ([type(error) for error in failed], last) == ([Unavailable] * 2, 2)
    [(block,)] = database.added
    assert block.start == 0
    assert len(list((tmp_path / "predictions" / "m").iterdir())) == 2
    log.close()


def test_database_that_never_answers_gives_503(
    log: RecordLog, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host died without ending the connection. The next record goes into a new segment, over a new connection."""
    monkeypatch.setattr("serve_apps.replica.record_log.ANSWER_TIMEOUT_S", 0.2)

    async def run() -> int:
        with pytest.raises(Unavailable, match="database does not answer"):
            await ask(log, 0)
        database.may_return.release()
        return await ask(log, 1)

    assert asyncio.run(run()) == 1
    [(block,)] = database.added
    assert block.start == 0
    log.close()


def test_full_segment_is_closed_after_its_blocks_are_added(
    log: RecordLog, database: Database, tmp_path: Path
) -> None:
    """Otherwise its upload could end the segment before its last records are in the database."""
    log._writer._max_bytes = 1
    database.may_return.release(10)

    async def run() -> None:
        for number in range(3):
            log.append(prediction(number))
        await log.after_durable(None)

    asyncio.run(run())
    [blocks] = database.added
    assert len({block.segment for block in blocks}) == 3
    assert not log._writer._unsynced
    log.close()
    assert count_records(tmp_path / "predictions" / "m") == 3


def test_broken_connection_costs_no_answer(shared: SharedState, tmp_path: Path) -> None:
    """The database was restarted: the block is added again over a new connection."""
    with running_replica(tmp_path, VALUE, durability=Durability.shared, shared=shared) as replica:
        assert replica.json(PREDICT, BODY)[0] == 200
        with replica.ledger.engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%%log_blocks%%' "
                "AND pid <> pg_backend_pid()"
            )
        assert replica.json(PREDICT, BODY)[0] == 200
        assert replica.log().height == 2


def test_database_that_is_down_gives_503(shared: SharedState, tmp_path: Path) -> None:
    """And 200 again when it is back. Nothing that was not answered counts as answered."""
    with running_replica(tmp_path, VALUE, durability=Durability.shared, shared=shared) as replica:
        assert replica.json(PREDICT, BODY)[0] == 200
        with pytest.MonkeyPatch.context() as patch:

            def down(*_: Any) -> None:
                raise sa.exc.OperationalError("", None, Exception("connection refused"))

            patch.setattr(BlockWriter, "_add", down)
            status, content = replica.json(PREDICT, BODY)
            assert (status, content["code"]) == (503, 503)
            assert "cannot be written" in content["error"]
        assert replica.json(PREDICT, BODY)[0] == 200


@pytest.mark.parametrize(
    ("root", "url"),
    [
        (".falaj", "postgresql+psycopg://db/falaj"),
        ("s3://bucket/a", None),
        ("s3://bucket/a", "sqlite:///x.db"),
    ],
)
def test_shared_durability_needs_shared_state(root: str, url: str | None) -> None:
    """A database on this machine's disk would be lost with the disk."""
    config = PlatformConfig(
        storage=StorageConfig(root=root),
        ledger=LedgerConfig(url=url),
        replica=ReplicaConfig(durability=Durability.shared),
    )
    with pytest.raises(ConfigError, match=r"durability=shared needs ledger\.url=postgresql"):
        check_durability(config)
    check_durability(PlatformConfig(storage=StorageConfig(root=root), ledger=LedgerConfig(url=url)))
