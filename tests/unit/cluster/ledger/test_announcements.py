"""Announcements of new events on PostgreSQL, and polls on SQLite."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from cluster.ledger import Ledger
from cluster.ledger import announcements as module
from cluster.ledger.announcements import Announcements
from cluster.ledger.events import ClusterStopped
from tests.servers.postgresql import end_connections, new_database

STOPPED = ClusterStopped(cluster_id="1")
NEVER = threading.Event()


@pytest.fixture
def ledger(server: str) -> Iterator[Ledger]:
    opened = Ledger(new_database(server, secrets.token_hex(4)))
    yield opened
    opened.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make polls so rare that only an announcement can end a wait in time."""
    monkeypatch.setattr(module, "LISTENING_POLL_S", 30.0)


def listening(ledger: Ledger) -> Announcements:
    announcements = Announcements(ledger.engine)
    announcements.wait(NEVER)
    assert announcements.is_listening
    return announcements


@pytest.mark.usefixtures("patient")
def test_append_of_another_connection_ends_the_wait(ledger: Ledger) -> None:
    """The event can be read when the wait ends, because an announcement comes with the commit."""
    announcements, heads = listening(ledger), []

    def follow() -> None:
        announcements.wait(NEVER)
        heads.append(ledger.head())

    thread = threading.Thread(target=follow)
    thread.start()
    other = Ledger(str(ledger.engine.url))
    other.append(STOPPED, actor="test")
    thread.join(10)
    other.close()
    announcements.close()
    assert heads == [1]


@pytest.mark.usefixtures("patient")
def test_announcement_between_two_waits_is_not_missed(ledger: Ledger) -> None:
    """An event that comes while the follower reads ends its next wait at once."""
    announcements = listening(ledger)
    ledger.append(STOPPED, actor="test")
    started = time.monotonic()
    announcements.wait(NEVER)
    announcements.close()
    assert time.monotonic() < started + 10


@pytest.mark.usefixtures("patient")
def test_append_that_is_rolled_back_announces_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower is not woken by an event that does not exist."""
    announcements = listening(ledger)
    with ledger.writing() as connection:
        module.announce(connection)
        connection.rollback()
    monkeypatch.setattr(module, "LISTENING_POLL_S", 0.2)
    started = time.monotonic()
    announcements.wait(NEVER)
    announcements.close()
    assert time.monotonic() >= started + 0.2


def test_broken_connection_is_opened_again(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait returns after it, so that events of the meantime are read."""
    monkeypatch.setattr(module, "RECONNECT_S", 0.0)
    announcements = listening(ledger)
    end_connections(ledger.engine)
    announcements.wait(NEVER)
    assert not announcements.is_listening
    announcements.wait(NEVER)
    assert announcements.is_listening
    announcements.close()


def test_database_that_is_down_is_polled(ledger: Ledger) -> None:
    """A follower then tries to read as often as it does without announcements."""
    port = ledger.engine.url.port
    engine = sa.create_engine(str(ledger.engine.url).replace(f":{port}/", ":9/"))
    announcements, started = Announcements(engine), time.monotonic()
    announcements.wait(NEVER)
    assert not announcements.is_listening
    assert time.monotonic() >= started + module.POLL_S


def test_sqlite_is_polled() -> None:
    """SQLite has no announcements."""
    announcements, started = Announcements(sa.create_engine("sqlite://")), time.monotonic()
    announcements.wait(NEVER)
    assert time.monotonic() >= started + module.POLL_S
    announcements.close()
