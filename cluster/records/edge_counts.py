"""The database of what the edges count, and the numbers of refused requests in it.

On PostgreSQL the tables are in the ledger's database, which all nodes share. With SQLite there is one machine, and they
are in a file of their own beside the ledger's: SQLite has one lock for all writers of a file, and an append to the
ledger, such as a rollback, must not wait for counts. They are no projections: no event contains them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cluster.ledger.database import connect, is_shared

FILE = "evidence.db"
"""Name of SQLite's file."""
HOUR = "%Y-%m-%dT%H"
"""Format of an hour in UTC, such as 2026-11-30T09."""
KEEP = dt.timedelta(days=70)
"""How long the numbers of an hour are kept. Monitoring compares an hour with those of eight weeks."""
METADATA = sa.MetaData()
REFUSALS = sa.Table(
    "edge_refusals",
    METADATA,
    sa.Column("model", sa.String(64), primary_key=True),
    sa.Column("hour", sa.String(13), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
)
"""Refused requests for predictions of all edges together. They are in no prediction log."""

HourOfModel = tuple[str, str]
"""Model and hour."""


def evidence_engine(ledger_engine: sa.Engine) -> sa.Engine:
    """Return the engine of the tables' database.

    In SQLite's file, a commit does not wait for the disk. After a power failure, position and counts are both those of
    an earlier moment, and the records are read again.
    """
    if is_shared(ledger_engine) or not ledger_engine.url.database:
        return ledger_engine
    engine = connect(f"sqlite:///{Path(ledger_engine.url.database).with_name(FILE)}")

    @sa.event.listens_for(engine, "connect")
    def commit_at_once(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA synchronous = NORMAL")

    return engine


def upsert(table: sa.Table, connection: sa.Connection) -> Any:
    """Return an `INSERT` into a table, with PostgreSQL's and SQLite's `ON CONFLICT`."""
    return postgresql.insert(table) if is_shared(connection) else sqlite.insert(table)


def add_refusals(connection: sa.Connection, refusals: Mapping[HourOfModel, int]) -> None:
    """Add numbers of refused requests, and remove those of old hours.

    Args:
        connection: The transaction that also stores how far the requests were read.
        refusals: Numbers by model and hour.
    """
    if not refusals:
        return
    insert = upsert(REFUSALS, connection)
    statement = insert.on_conflict_do_update(
        index_elements=[REFUSALS.c.model, REFUSALS.c.hour],
        set_={"requests": REFUSALS.c.requests + insert.excluded.requests},
    )
    # Sorted, so that two edges lock the rows in the same order and PostgreSQL sees no deadlock.
    rows = [{"model": model, "hour": hour, "requests": n} for (model, hour), n in sorted(refusals.items())]
    connection.execute(statement, rows)
    newest = max(dt.datetime.strptime(hour, HOUR) for _, hour in refusals)
    models = sorted({model for model, _ in refusals})
    is_old = REFUSALS.c.hour < (newest - KEEP).strftime(HOUR)
    connection.execute(REFUSALS.delete().where(REFUSALS.c.model.in_(models), is_old))


def read_refusals(ledger_engine: sa.Engine, model: str) -> dict[str, int]:
    """Return the numbers of a model's refused requests by hour. They are complete up to a second ago."""
    engine = evidence_engine(ledger_engine)
    if not sa.inspect(engine).has_table(REFUSALS.name):
        return {}
    query = sa.select(REFUSALS.c.hour, REFUSALS.c.requests).where(REFUSALS.c.model == model)
    with engine.connect() as connection:
        return {row.hour: row.requests for row in connection.execute(query)}
