"""Limits that were set for single principals and tenants, as a projection of the ledger."""

from __future__ import annotations

import json

import sqlalchemy as sa

from cluster.ledger import Entry, Ledger
from cluster.ledger.events import EdgeLimitSet, Subject, require_known
from cluster.ledger.projection import Projection
from serve_apps.edge.haproxy.request_limits import OwnLimits

METADATA = sa.MetaData()
LIMITS = sa.Table(
    "edge_limits_1",
    METADATA,
    sa.Column("limited", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(1024), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
)
"""The newest limits of each principal and tenant that has its own limits."""


def read_own_limits(ledger: Ledger) -> OwnLimits:
    """Return the limits of single principals and tenants after the ledger's last event."""
    projection = Projection(
        ledger, name=LIMITS.name, metadata=METADATA, wanted=Subject.limit.includes, apply=_apply_stored
    )
    limits = OwnLimits()
    with projection.reading() as connection:
        for content in connection.execute(sa.select(LIMITS.c.event).order_by(LIMITS.c.seq)).scalars():
            limits = limits.apply(EdgeLimitSet(**json.loads(content)))
    return limits


def _apply_stored(connection: sa.Connection, entry: Entry) -> None:
    """Store the newest limit of a principal or tenant."""
    event = entry.event()
    require_known(event, Subject.limit)
    if not isinstance(event, EdgeLimitSet):
        return
    connection.execute(LIMITS.delete().where(LIMITS.c.limited == event.limited, LIMITS.c.name == event.name))
    row = {
        "limited": event.limited,
        "name": event.name,
        "seq": entry.seq,
        "event": json.dumps(event.payload()),
    }
    if event.requests_per_s is not None or event.concurrent is not None:
        connection.execute(LIMITS.insert().values(row))
