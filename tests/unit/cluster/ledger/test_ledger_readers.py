"""Tests of reads that follow the ledger: the event index and projections, on SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from cluster.ledger import Entry, Ledger, index
from cluster.ledger.chain import verify_chain
from cluster.ledger.database import EVENTS
from cluster.ledger.events import (
    AliasMoved,
    ClusterStopped,
    LedgerEvent,
    RowsRemoved,
    ViewMaterialized,
)
from cluster.ledger.following import BATCH, position_of
from cluster.ledger.projection import Projection
from tests.samples.many_events import load_events

SECOND = dt.timedelta(seconds=1)


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    opened = Ledger(url)
    yield opened
    opened.close()


def materialized(view: str, table_version: int = 1) -> ViewMaterialized:
    return ViewMaterialized(
        view=view,
        view_version="v",
        table_version=table_version,
        as_of="2026-01-01T00:00:00+00:00",
        entities=1,
    )


def versions(entries: Iterator[Entry]) -> list[int]:
    return [entry.payload["table_version"] for entry in entries]


def index_position(ledger: Ledger) -> int:
    with ledger.engine.connect() as connection:
        return position_of(connection, index.NAME)


def test_events_are_found_by_a_value_of_their_payload(ledger: Ledger) -> None:
    """In order or the newest first, also over many pages, and without the events of other types and values."""
    for number in range(50):
        ledger.append(materialized("income", number), actor="user:a")
        ledger.append(materialized("household", number), actor="user:a")
    ledger.append(ClusterStopped(cluster_id="c"), actor="user:a")
    assert index_position(ledger) == ledger.head()
    assert versions(ledger.find(ViewMaterialized, view="income")) == list(range(50))
    assert versions(ledger.find(ViewMaterialized, view="income", newest_first=True)) == list(
        range(49, -1, -1)
    )
    newest = ledger.newest(ViewMaterialized, view="household")
    assert newest is not None
    assert (newest.seq, newest.payload["table_version"]) == (100, 49)
    assert ledger.newest(ViewMaterialized, view="other") is None


def test_lookup_by_a_key_that_is_not_indexed_is_an_error(ledger: Ledger) -> None:
    """It would find nothing."""
    with pytest.raises(KeyError, match="not indexed by entities"):
        ledger.newest(ViewMaterialized, entities=1)


def test_keys_name_fields_of_known_events() -> None:
    """A key of a field that does not exist would never find an event."""
    known = {cls.__name__: cls for cls in LedgerEvent.__subclasses__()}
    for type_name, keys in index.KEYS.items():
        for key in keys:
            assert {*key.fields, key.having} - {""} <= known[type_name].__dataclass_fields__.keys()


def test_events_of_an_older_release_are_found(ledger: Ledger) -> None:
    """It appends without the index. The next lookup adds them, and later appends continue the index."""
    ledger.append(materialized("income", 1), actor="user:a")
    load_events(ledger, (materialized("income", 2 + number) for number in range(BATCH + 50)), apart=SECOND)
    ledger.append(materialized("income", BATCH + 52), actor="user:a")
    assert index_position(ledger) == 1
    assert versions(ledger.find(ViewMaterialized, view="income")) == list(range(1, BATCH + 53))
    ledger.append(materialized("income", BATCH + 53), actor="user:a")
    assert index_position(ledger) == ledger.head()
    newest = ledger.newest(ViewMaterialized, view="income")
    assert newest is not None
    assert newest.payload["table_version"] == BATCH + 53
    assert len(list(verify_chain(ledger.entries()))) == ledger.head()


def test_ledger_of_an_older_release_gets_the_tables_and_indexes(ledger: Ledger) -> None:
    """Its events can be looked up. The same happens after the index was dropped."""
    ledger.append(materialized("income", 7), actor="user:a")
    with ledger.writing() as connection:
        connection.exec_driver_sql(f"DROP TABLE {index.NAME}")
        with suppress(OperationalError):
            connection.exec_driver_sql("DROP INDEX IF EXISTS ix_events_type_seq")
    reopened = Ledger(str(ledger.engine.url))
    reopened.append(materialized("income", 8), actor="user:a")
    assert versions(reopened.find(ViewMaterialized, view="income")) == [7, 8]
    names = {found["name"] for found in sa.inspect(reopened.engine).get_indexes(EVENTS.name)}
    assert ("ix_events_type_seq" in names) == (reopened.engine.dialect.name == "postgresql")
    reopened.close()


COUNTS = sa.MetaData()
COUNTED = sa.Table("counted", COUNTS, sa.Column("seq", sa.Integer, primary_key=True))


def counting(ledger: Ledger) -> Projection:
    """A projection with the seq of each `ViewMaterialized`."""

    def apply(connection: sa.Connection, entry: Entry) -> None:
        connection.execute(COUNTED.insert().values(seq=entry.seq))

    wanted = (ViewMaterialized.__name__, RowsRemoved.__name__).__contains__
    return Projection(ledger, name="counted", metadata=COUNTS, wanted=wanted, apply=apply)


def test_projection_reads_only_events_of_its_types(ledger: Ledger) -> None:
    """Events of other types do not cause a write at the next read."""
    projection = counting(ledger)
    ledger.append(materialized("income"), actor="user:a")
    ledger.append(ClusterStopped(cluster_id="c"), actor="user:a")
    with projection.reading() as connection:
        assert list(connection.execute(sa.select(COUNTED.c.seq)).scalars()) == [1]
    ledger.append(AliasMoved(name="m", alias="a", version=1, previous=None, reason=""), actor="user:a")
    with projection.reading() as connection:
        assert position_of(connection, "counted") == 2


def test_dropped_projection_is_built_again(ledger: Ledger) -> None:
    """From the first event on."""
    ledger.append(materialized("income"), actor="user:a")
    with counting(ledger).reading():
        pass
    with ledger.writing() as connection:
        COUNTS.drop_all(connection)
    with counting(ledger).reading() as connection:
        assert list(connection.execute(sa.select(COUNTED.c.seq)).scalars()) == [1]


class _Stopped(Exception):
    """Ends a catch-up of the test."""


def test_append_does_not_wait_for_the_whole_catch_up(tmp_path: Path) -> None:
    """A projection applies 100,000 events in short transactions, and another writer appends between two of them."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    event = materialized("income")
    load_events(ledger, (event for _ in range(100_000)), apart=SECOND)
    appended, positions = threading.Event(), []

    def apply(connection: sa.Connection, entry: Entry) -> None:
        if appended.is_set():
            raise _Stopped
        connection.execute(COUNTED.insert().values(seq=entry.seq))

    def position() -> int:
        with ledger.engine.connect() as connection:
            return position_of(connection, "counted")

    wanted = (ViewMaterialized.__name__,).__contains__
    projection = Projection(ledger, name="counted", metadata=COUNTS, wanted=wanted, apply=apply)

    def catch_up() -> None:
        with suppress(_Stopped), projection.reading():
            positions.append(position())

    thread = threading.Thread(target=catch_up)
    thread.start()
    while position() == 0:
        pass
    ledger.append(ClusterStopped(cluster_id="c"), actor="user:a")
    reached = position()
    appended.set()
    thread.join()
    assert 0 < reached < 100_000
    assert positions == []


def test_projection_continues_after_an_error(ledger: Ledger) -> None:
    """A batch that fails is rolled back as a whole, and the batches before it stay."""
    load_events(ledger, (materialized("income") for _ in range(2 * BATCH + 50)), apart=SECOND)
    fails = [True]

    def apply(connection: sa.Connection, entry: Entry) -> None:
        if fails and entry.seq == BATCH + 10:
            raise _Stopped
        connection.execute(COUNTED.insert().values(seq=entry.seq))

    wanted = (ViewMaterialized.__name__,).__contains__
    projection = Projection(ledger, name="counted", metadata=COUNTS, wanted=wanted, apply=apply)
    with pytest.raises(_Stopped), projection.reading():
        pass
    with ledger.engine.connect() as connection:
        assert position_of(connection, "counted") == BATCH
    fails.clear()
    with projection.reading() as connection:
        assert list(connection.execute(sa.select(COUNTED.c.seq)).scalars()) == list(range(1, 2 * BATCH + 51))
