"""Locks of the ledger's PostgreSQL database end with the machine that holds them, and others do not wait for ever."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger, database
from cluster.ledger.database import updating
from cluster.ledger.events import ClusterStopped
from tests.servers.postgresql import new_database

STOPPED = ClusterStopped(cluster_id="1")
TCP = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")


@pytest.fixture
def ledger(server: str) -> Iterator[Ledger]:
    opened = Ledger(new_database(server, secrets.token_hex(4)))
    yield opened
    opened.close()


def shown(connection: sa.Connection, *names: str) -> list[str]:
    return [str(connection.exec_driver_sql(f"SHOW {name}").scalar_one()) for name in names]


def test_server_ends_the_connection_of_a_machine_that_died(ledger: Ledger) -> None:
    """The server finds a dead client within seconds. With PostgreSQL's default, this takes two hours."""
    with ledger.engine.connect() as connection:
        assert shown(connection, *TCP) == ["5", "2", "3", "10000"]


def test_transaction_that_writes_limits_its_locks(ledger: Ledger) -> None:
    """The limits end with the transaction, so a pooler gives them to no other one."""
    names = ("lock_timeout", "idle_in_transaction_session_timeout")
    for transaction in (ledger.writing(), updating(ledger.engine)):
        with transaction as connection:
            assert shown(connection, *names) == ["10s", "30s"]
    with ledger.engine.connect() as connection:
        assert shown(connection, *names) == ["0", "0"]


def test_append_says_that_another_process_holds_the_lock(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next append after the lock is free succeeds over the same connection."""
    other = Ledger(ledger.engine.url.render_as_string(hide_password=False))
    with other.writing():
        monkeypatch.setitem(database._LIMITS, "lock_timeout", "100ms")
        with pytest.raises(sa.exc.OperationalError, match="held a lock of the ledger's database for 100ms"):
            ledger.append(STOPPED, actor="test")
    other.close()
    assert ledger.append(STOPPED, actor="test").seq == 1


def test_transaction_that_stays_idle_loses_its_lock(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process was stopped in the middle. Others go on, and its own commit fails."""
    other = Ledger(ledger.engine.url.render_as_string(hide_password=False))
    monkeypatch.setitem(database._LIMITS, "idle_in_transaction_session_timeout", "100ms")
    with pytest.raises(sa.exc.DBAPIError), other.writing():
        assert ledger.append(STOPPED, actor="test").seq == 1
    other.close()
