"""The connection over which a replica adds blocks to the ledger's database."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger.database import updating
from cluster.records.blocks import Block, BlockWriter, segment_sizes
from cluster.records.database import BLOCKS, ensure_tables
from cluster.records.location import LogLocation
from tests.servers.polling import wait_until
from tests.servers.postgresql import new_database

FIRST, SECOND = Block("s", 0, b"head\n"), Block("s", 5, b"a\n")


@pytest.fixture
def ledger(server: str) -> Iterator[Ledger]:
    opened = Ledger(new_database(server, secrets.token_hex(4)))
    ensure_tables(opened)
    yield opened
    opened.close()


@pytest.fixture
def location(ledger: Ledger, tmp_path: Path) -> LogLocation:
    folder = tmp_path / "predictions" / "m"
    return LogLocation(name="predictions/m", folder=folder, shared="s3://b/m", engine=ledger.engine)


def test_abandoned_call_ends_at_once(ledger: Ledger, location: LogLocation) -> None:
    """The database holds back its answer. The call fails without a second try, and leaves no thread behind."""
    writer = BlockWriter(location)
    writer.add([FIRST])
    with ThreadPoolExecutor(1) as pool, updating(ledger.engine) as connection:
        connection.execute(BLOCKS.update().values(sealed=False))  # locks the row that the next block needs
        adding = pool.submit(writer.add, [SECOND])
        wait_until(lambda: _is_waiting(ledger))
        writer.abandon()
        with pytest.raises(sa.exc.DBAPIError):
            adding.result(timeout=5)
    other = BlockWriter(location)
    other.add([SECOND])  # the abandoned call may have added it too; adding it twice changes nothing
    assert segment_sizes(ledger.engine, location.name) == {"s": 7}
    other.close()


def test_call_that_is_abandoned_before_it_is_connected_fails(location: LogLocation) -> None:
    """A connection can take longer than the wait for an answer."""
    writer = BlockWriter(location)
    threading.Thread(target=writer.abandon).start()
    wait_until(lambda: writer._is_abandoned)
    with pytest.raises(sa.exc.DBAPIError):
        writer.add([FIRST])


def test_connection_to_a_dead_host_ends_by_itself(location: LogLocation) -> None:
    """TCP probes end the connection of a replica that waits for an answer. A URL with its own settings wins."""
    writer = BlockWriter(location)
    writer.add([FIRST])
    assert writer._connection is not None
    driver = writer._connection.connection.driver_connection
    assert driver is not None
    used = driver.info.get_parameters()
    names = ("connect_timeout", "tcp_user_timeout", "keepalives_idle", "keepalives_interval")
    assert [used[name] for name in (*names, "keepalives_count")] == ["3", "5000", "2", "1", "3"]
    writer.close()


def _is_waiting(ledger: Ledger) -> bool:
    query = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    with ledger.engine.connect() as connection:
        return bool(connection.execute(query).scalar())
