"""Applies the ledger's new events to other tables of the ledger's database, in short transactions.

Projections and the event index are the followers of the ledger. A follower stores its position next to its rows, and
updates both in one transaction. It reads only events of its own types, which the database index of `type` finds. Each
transaction applies at most `BATCH` events. Between transactions, waiting writers can take the write lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import sqlalchemy as sa

from cluster.ledger.chain import Entry
from cluster.ledger.database import EVENTS, POSITIONS, to_entry, writing

BATCH = 200
"""Largest number of events of one transaction. Such a transaction takes 5 to 30 ms."""
_PAUSE = 0.5
"""Pause after a transaction, as a fraction of the transaction's duration. A writer that waits for SQLite's lock tries
to take it only from time to time."""

Apply = Callable[[sa.Connection, Sequence[Entry]], None]
"""Function that applies events in their order to tables. It must ignore unknown events."""

HEAD = sa.select(sa.func.coalesce(sa.func.max(EVENTS.c.seq), 0))
"""Query for the greatest `seq`. It is built once: building takes longer than running it, many times a second."""

# This query looks up each type once in the index of `type`. DISTINCT would read the index entry of every event.
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
    """Return the `seq` of the newest event of each event type in the ledger."""
    return {row.type: row.seq for row in connection.execute(_NEWEST)}


def position_of(connection: sa.Connection, name: str) -> int:
    """Return a follower's position: all events of its types up to this `seq` are applied."""
    return int(connection.execute(_POSITION, {"name": name}).scalar_one_or_none() or 0)


def is_behind(connection: sa.Connection, name: str, wanted: Callable[[str], bool]) -> bool:
    """Return whether the ledger has events of the follower's types after the follower's position."""
    position = position_of(connection, name)
    return any(seq > position and wanted(type_name) for type_name, seq in newest_by_type(connection).items())


def new_entries(connection: sa.Connection, after: int, wanted: Callable[[str], bool]) -> Iterator[Entry]:
    """Yield the entries of the wanted types with `seq > after`, type by type."""
    for type_name, newest in newest_by_type(connection).items():
        if newest > after and wanted(type_name):
            query = sa.select(EVENTS).where(EVENTS.c.type == type_name, EVENTS.c.seq > after)
            yield from map(to_entry, connection.execute(query))


def catch_up(engine: sa.Engine, name: str, *, wanted: Callable[[str], bool], apply: Apply) -> None:
    """Apply all events that the ledger has now, and that are new to a follower, to the follower's tables."""
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
    """Return the first entries of the given types, at most `BATCH` entries."""
    seqs: list[int] = []
    for type_name in types:
        parameters = {"type": type_name, "after": after, "upto": upto}
        seqs += connection.execute(_SEQS, parameters).scalars()
    first = sorted(seqs)[:BATCH]
    return [to_entry(row) for row in connection.execute(_ENTRIES, {"seqs": first})] if first else []
