"""How tables in the ledger's database follow its events: by type, from a stored position, in short transactions.

Projections and the event index follow the ledger. Each stores its position beside its rows and updates both in one
transaction. Events of other types are not read at all: the index of `type` finds the events that matter. The write lock
is held for one batch at a time, and released between batches for writers that wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import sqlalchemy as sa

from cluster.ledger.chain import Entry
from cluster.ledger.database import EVENTS, POSITIONS, to_entry, writing

BATCH = 200
"""Events of one transaction. It takes 5 to 30 ms."""
_PAUSE = 0.5
"""Pause between two transactions, in proportion to the first one's duration. A writer that waits for SQLite's lock only
asks for it from time to time."""

Apply = Callable[[sa.Connection, Sequence[Entry]], None]
"""Applies events in their order to tables. It must ignore events that it does not know."""

HEAD = sa.select(sa.func.coalesce(sa.func.max(EVENTS.c.seq), 0))
"""Built once, because building the query takes longer than running it, and the edge runs it many times a second."""

# One step through the index of `type` for each type, where DISTINCT would read the entry of each event.
_NEWEST = sa.text(
    "WITH RECURSIVE types(type) AS (SELECT min(type) FROM events UNION ALL "
    "SELECT (SELECT min(type) FROM events WHERE events.type > types.type) FROM types WHERE types.type IS NOT NULL) "
    "SELECT type, (SELECT max(seq) FROM events WHERE events.type = types.type) AS seq "
    "FROM types WHERE type IS NOT NULL"
)
_POSITION = sa.select(POSITIONS.c.seq).where(POSITIONS.c.name == sa.bindparam("name"))
_SEQS = (
    sa.select(EVENTS.c.seq)
    .where(EVENTS.c.type == sa.bindparam("type"), EVENTS.c.seq > sa.bindparam("after"))
    .where(EVENTS.c.seq <= sa.bindparam("upto"))
    .order_by(EVENTS.c.seq)
    .limit(BATCH)
)
_ENTRIES = (
    sa.select(EVENTS).where(EVENTS.c.seq.in_(sa.bindparam("seqs", expanding=True))).order_by(EVENTS.c.seq)
)


def newest_by_type(connection: sa.Connection) -> dict[str, int]:
    """Return the event types of the ledger, each with the `seq` of its newest event."""
    return {row.type: row.seq for row in connection.execute(_NEWEST)}


def position_of(connection: sa.Connection, name: str) -> int:
    """Return a follower's position: all events of its types up to this `seq` are applied."""
    return int(connection.execute(_POSITION, {"name": name}).scalar_one_or_none() or 0)


def is_behind(connection: sa.Connection, name: str, wanted: Callable[[str], bool]) -> bool:
    """Return whether the ledger has newer events than the follower's position, of the types that it wants."""
    position = position_of(connection, name)
    return any(seq > position and wanted(type_name) for type_name, seq in newest_by_type(connection).items())


def catch_up(engine: sa.Engine, name: str, *, wanted: Callable[[str], bool], apply: Apply) -> None:
    """Apply the ledger's new events to a follower's tables, up to the events that exist now."""
    with engine.connect() as connection:
        target = int(connection.execute(HEAD).scalar_one())
    while True:
        with writing(engine) as connection:
            started = time.perf_counter()
            position = _apply_batch(connection, name, wanted=wanted, apply=apply)
        if position >= target:
            return
        time.sleep(_PAUSE * (time.perf_counter() - started))


def _apply_batch(connection: sa.Connection, name: str, *, wanted: Callable[[str], bool], apply: Apply) -> int:
    """Apply the next events, and return the new position."""
    position = position_of(connection, name)
    head = int(connection.execute(HEAD).scalar_one())
    if position >= head:
        return position
    newest = newest_by_type(connection).items()
    types = [type_name for type_name, seq in newest if seq > position and wanted(type_name)]
    entries = _read_entries(connection, types, after=position, upto=head)
    if entries:
        apply(connection, entries)
    reached = entries[-1].seq if len(entries) == BATCH else head
    connection.execute(POSITIONS.delete().where(POSITIONS.c.name == name))
    connection.execute(POSITIONS.insert().values(name=name, seq=reached))
    return reached


def _read_entries(connection: sa.Connection, types: Iterable[str], *, after: int, upto: int) -> list[Entry]:
    """Return the first entries of some types, at most `BATCH`."""
    seqs: list[int] = []
    for type_name in types:
        parameters = {"type": type_name, "after": after, "upto": upto}
        seqs += connection.execute(_SEQS, parameters).scalars()
    first = sorted(seqs)[:BATCH]
    return [to_entry(row) for row in connection.execute(_ENTRIES, {"seqs": first})] if first else []
