"""Tables with the evidence of rollouts, and the statements that add to them.

A unit has one row for each kind of event, so it counts once, whatever the number of edges and retries, and a record
that is read twice changes nothing. All times are Unix milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import sqlalchemy as sa

from cluster.records.edge_counts.database import METADATA, upsert
from cluster.statistics.policy import MAX_UNITS, UnitEvent
from serve_apps.rollout.assignment import Arm

READERS = sa.Table(
    "evidence_readers",
    METADATA,
    sa.Column("edge", sa.String(32), primary_key=True),
    sa.Column(
        "passes", sa.BigInteger, nullable=False
    ),  # compared when it is written, so there is one reader at a time
    sa.Column("activities", sa.Text, nullable=False),
    sa.Column("read_ms", sa.BigInteger, nullable=False),
)
"""What each edge saw of each rollout."""
FILES = sa.Table(
    "evidence_files",
    METADATA,
    sa.Column("edge", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("records", sa.BigInteger, nullable=False),
    sa.Column("broken", sa.BigInteger, nullable=False),
)
"""Each edge's positions in its files."""
COUNTED = sa.Table(
    "evidence_rollouts",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("slow_ms", sa.Float, nullable=True),  # null: no answer is slow
)
"""Rollouts whose units are counted."""
EVENTS = sa.Table(
    "evidence_events",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("event", sa.String(16), primary_key=True),
    sa.Column("unit", sa.String(16), primary_key=True),
    sa.Column("arm", sa.String(16), nullable=False),
    sa.Column("below", sa.Integer, nullable=False),
    sa.Column("last_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_evidence_events_counts", "rollout", "arm", "event", "below", "last_ms"),
)
"""A unit's last event of each kind. A unit had an event in the current window if its last one is in it."""
UNITS = sa.Table(
    "evidence_units",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("unit", sa.String(16), primary_key=True),
    sa.Column("below", sa.Integer, nullable=False),
    sa.Column("first_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_evidence_units_counts", "rollout", "below", "first_ms"),
)
"""The first request of each unit of the treatment at its greatest weight."""
LIMITS = sa.Table(
    "evidence_limits",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("max_units", sa.BigInteger, nullable=False),
)
"""How many units of each kind are stored for one step of a rollout. An older release does not know this table."""
SIZES = sa.Table(
    "evidence_sizes",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("below", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("rows", sa.BigInteger, nullable=False),
)
"""Number of stored units of each step, by kind (`sizes`)."""
LOOKS = sa.Table(
    "evidence_looks",
    METADATA,
    sa.Column("rollout", sa.String(32), primary_key=True),
    sa.Column("evidence", sa.Text, nullable=False),
)
"""The counts of the controller's last look, for callers that only show them."""


class Counted(NamedTuple):
    """How a registered rollout is counted."""

    slow_ms: float
    """From which latency an answer is slow."""
    max_units: int
    """How many units of each kind are stored for a step."""


UnitOfRollout = tuple[str, str]
"""Rollout and unit."""
EventOfUnit = tuple[str, UnitEvent, str]
"""Rollout, event and unit."""


def add_events(connection: sa.Connection, events: Mapping[EventOfUnit, tuple[Arm | str, int, int]]) -> None:
    """Store events, unless a unit has a later one.

    Args:
        connection: A transaction.
        events: Arm, `below` and time of each.
    """
    insert = upsert(EVENTS, connection)
    new, stored = insert.excluded, EVENTS.c
    statement = insert.on_conflict_do_update(
        index_elements=[stored.rollout, stored.event, stored.unit],
        set_={"below": new.below, "last_ms": new.last_ms},
        where=(new.below > stored.below) | ((new.below == stored.below) & (new.last_ms > stored.last_ms)),
    )
    # Sorted, so that two edges lock the rows in the same order and PostgreSQL sees no deadlock.
    rows = [
        {"rollout": rollout, "event": event, "unit": unit, "arm": arm, "below": below, "last_ms": time}
        for (rollout, event, unit), (arm, below, time) in sorted(events.items())
    ]
    if rows:
        connection.execute(statement, rows)


def add_units(connection: sa.Connection, units: Mapping[UnitOfRollout, tuple[int, int]]) -> None:
    """Store first requests, unless a unit has an earlier one at the same weight, or one at a greater weight.

    Args:
        connection: A transaction.
        units: `below` and time of each.
    """
    insert = upsert(UNITS, connection)
    new, stored = insert.excluded, UNITS.c
    statement = insert.on_conflict_do_update(
        index_elements=[stored.rollout, stored.unit],
        set_={"below": new.below, "first_ms": new.first_ms},
        where=(new.below > stored.below) | ((new.below == stored.below) & (new.first_ms < stored.first_ms)),
    )
    rows = [
        {"rollout": rollout, "unit": unit, "below": below, "first_ms": time}
        for (rollout, unit), (below, time) in sorted(units.items())
    ]
    if rows:
        connection.execute(statement, rows)


def counted_rollouts(connection: sa.Connection) -> dict[str, Counted]:
    """Return the registered rollouts."""
    joined = COUNTED.outerjoin(LIMITS, COUNTED.c.rollout == LIMITS.c.rollout)
    query = sa.select(COUNTED.c.rollout, COUNTED.c.slow_ms, LIMITS.c.max_units).select_from(joined)
    return {
        row.rollout: Counted(
            slow_ms=math.inf if row.slow_ms is None else row.slow_ms,
            max_units=MAX_UNITS if row.max_units is None else row.max_units,
        )
        for row in connection.execute(query)
    }


def remove_rollout(connection: sa.Connection, rollout: str, tables: Iterable[sa.Table]) -> None:
    """Remove a rollout's rows from these tables."""
    for table in tables:
        connection.execute(table.delete().where(table.c.rollout == rollout))


def remove_batch(connection: sa.Connection, rollout: str, table: sa.Table, *, at_most: int) -> int:
    """Remove some of a rollout's rows from a table, and return their number."""
    keys = list(table.primary_key.columns)
    batch = sa.select(*keys).where(table.c.rollout == rollout).limit(at_most)
    removed = connection.execute(table.delete().where(sa.tuple_(*keys).in_(batch)))
    return int(removed.rowcount)
