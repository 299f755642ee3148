"""Numbers of refused requests, by model and hour.

They are stored for each access file. If an edge reads a file again from its beginning, the file's numbers are replaced,
so no request counts twice. The numbers of files that were removed stay.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import sqlalchemy as sa

from cluster.records.edge_counts.database import METADATA, evidence_engine, upsert

HOUR = "%Y-%m-%dT%H"
"""Format of an hour in UTC, such as 2026-11-30T09."""
KEEP = dt.timedelta(days=70)
"""How long the numbers of an hour are kept. Monitoring compares an hour with those of eight weeks."""
REFUSALS = sa.Table(
    "edge_file_refusals",
    METADATA,
    sa.Column("edge", sa.String(32), primary_key=True),
    sa.Column("file", sa.String(64), primary_key=True),
    sa.Column("model", sa.String(64), primary_key=True),
    sa.Column("hour", sa.String(13), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
)
"""Refused requests for predictions. They are in no prediction log."""


class RefusalKey(NamedTuple):
    """What a number of refused requests belongs to."""

    file: str
    """Name of the access file."""
    model: str
    hour: str


def remove_refusals(connection: sa.Connection, edge: str, files: Iterable[str]) -> None:
    """Remove the numbers of files that are read from their beginning."""
    if names := sorted(files):
        is_read_again = (REFUSALS.c.edge == edge) & REFUSALS.c.file.in_(names)
        connection.execute(REFUSALS.delete().where(is_read_again))


def add_refusals(connection: sa.Connection, edge: str, refusals: Mapping[RefusalKey, int]) -> None:
    """Add numbers of refused requests, and remove those of old hours.

    Args:
        connection: The transaction that also stores how far the requests were read.
        edge: Id of the edge.
        refusals: Numbers by file, model and hour.
    """
    if not refusals:
        return
    insert = upsert(REFUSALS, connection)
    statement = insert.on_conflict_do_update(
        index_elements=list(REFUSALS.primary_key.columns),
        set_={"requests": REFUSALS.c.requests + insert.excluded.requests},
    )
    rows = [{"edge": edge, **key._asdict(), "requests": n} for key, n in sorted(refusals.items())]
    connection.execute(statement, rows)
    newest = max(dt.datetime.strptime(key.hour, HOUR) for key in refusals)
    models = sorted({key.model for key in refusals})
    is_old = REFUSALS.c.hour < (newest - KEEP).strftime(HOUR)  # of all edges: one may be gone
    connection.execute(REFUSALS.delete().where(REFUSALS.c.model.in_(models), is_old))


def read_refusals(ledger_engine: sa.Engine, model: str) -> dict[str, int]:
    """Return the numbers of a model's refused requests by hour. They are complete up to a second ago."""
    engine = evidence_engine(ledger_engine)
    if not sa.inspect(engine).has_table(REFUSALS.name):
        return {}
    query = sa.select(REFUSALS.c.hour, sa.func.sum(REFUSALS.c.requests)).where(REFUSALS.c.model == model)
    with engine.connect() as connection:
        return {hour: int(number) for hour, number in connection.execute(query.group_by(REFUSALS.c.hour))}
