"""Numbers of refused requests, by model and hour."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

import sqlalchemy as sa

from cluster.records.edge_counts.database import METADATA, evidence_engine, upsert

HOUR = "%Y-%m-%dT%H"
"""Format of an hour in UTC, such as 2026-11-30T09."""
KEEP = dt.timedelta(days=70)
"""How long the numbers of an hour are kept. Monitoring compares an hour with those of eight weeks."""
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
