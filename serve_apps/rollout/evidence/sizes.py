"""How many units are stored for a step of a rollout, and the limit of their number.

A client can invent a new unit for each request. Without a limit, the tables would grow for ever. So each step of a
rollout stores at most `max_units` units with a first request, and as many with each kind of event. Further units are
not stored. Whether a unit is stored depends only on the number of those before it and on its hash, and never on its
arm, so the tests of the stored units stay valid. The verdict is `hold` from then on, except for a rollback.

The number is a row that each pass increases, so nobody has to count the units. If two edges store the same new unit at
the same moment, it is counted twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import sqlalchemy as sa

from cluster.records.edge_counts.database import upsert
from serve_apps.rollout.evidence.tables import (
    EVENTS,
    SIZES,
    UNITS,
    Counted,
    EventOfUnit,
    UnitOfRollout,
)

OF_ALL_STEPS = 0
"""Stands for `below` in a number that is not of one step."""
_PAGE = 500
_Key = TypeVar("_Key", UnitOfRollout, EventOfUnit)


class Kind(NamedTuple):
    """What a number counts: units of one kind in one step."""

    rollout: str
    below: int
    name: str
    """An event, `unit` or `entered`."""


class Admitted(NamedTuple):
    """What a pass may store."""

    events: dict[EventOfUnit, tuple[str, int, int]]
    units: dict[UnitOfRollout, tuple[int, int]]
    new: dict[Kind, int]
    """How many of them are not stored yet."""


def admit(
    connection: sa.Connection,
    counted: Mapping[str, Counted],
    events: Mapping[EventOfUnit, tuple[str, int, int]],
    units: Mapping[UnitOfRollout, tuple[int, int]],
) -> Admitted:
    """Return the events and units that are stored already, or for which there is room.

    Args:
        connection: A transaction.
        counted: The registered rollouts.
        events: Arm, `below` and time of each.
        units: `below` and time of each.
    """
    of_events = {key: Kind(key[0], below, key[1]) for key, (_, below, _) in events.items()}
    of_units = {key: Kind(key[0], below, "unit") for key, (below, _) in units.items()}
    new: dict[Kind, int] = {}
    kept_events = set(_with_room(connection, counted, of_events, new))
    kept_units = set(_with_room(connection, counted, of_units, new))
    return Admitted(
        events={key: value for key, value in events.items() if key in kept_events},
        units={key: value for key, value in units.items() if key in kept_units},
        new=new,
    )


def add_sizes(connection: sa.Connection, new: Mapping[Kind, int]) -> None:
    """Increase the numbers of stored units."""
    insert = upsert(SIZES, connection)
    statement = insert.on_conflict_do_update(
        index_elements=[SIZES.c.rollout, SIZES.c.below, SIZES.c.kind],
        set_={"rows": SIZES.c.rows + insert.excluded.rows},
    )
    rows = [
        {"rollout": kind.rollout, "below": kind.below, "kind": kind.name, "rows": number}
        for kind, number in sorted(new.items())
    ]
    if rows:
        connection.execute(statement, rows)


def size(connection: sa.Connection, kind: Kind) -> int:
    """Return how many units of a kind are stored for a step."""
    is_kind = (SIZES.c.rollout == kind.rollout) & (SIZES.c.below == kind.below) & (SIZES.c.kind == kind.name)
    return int(connection.execute(sa.select(SIZES.c.rows).where(is_kind)).scalar_one_or_none() or 0)


def stored_units(connection: sa.Connection, rollout: str, below: int) -> int:
    """Return the greatest number of stored units of any kind, in a step or in all of them."""
    of_step = (SIZES.c.rollout == rollout) & SIZES.c.below.in_((below, OF_ALL_STEPS))
    return int(connection.execute(sa.select(sa.func.max(SIZES.c.rows)).where(of_step)).scalar_one() or 0)


def _with_room(
    connection: sa.Connection,
    counted: Mapping[str, Counted],
    wanted: Mapping[_Key, Kind],
    new: dict[Kind, int],
) -> Iterator[_Key]:
    """Yield the units that are stored already, then as many others as have room, and add these to `new`."""
    by_kind: dict[Kind, list[_Key]] = defaultdict(list)
    for key, kind in wanted.items():
        by_kind[kind].append(key)
    for kind, keys in by_kind.items():
        stored = _stored(connection, kind, [key[-1] for key in keys])
        others = sorted((key for key in keys if key[-1] not in stored), key=lambda key: key[-1])
        room = max(0, counted[kind.rollout].max_units - size(connection, kind)) if others else 0
        yield from (key for key in keys if key[-1] in stored)
        yield from others[:room]
        if others[:room]:
            new[kind] = len(others[:room])


def _stored(connection: sa.Connection, kind: Kind, units: Sequence[str]) -> set[str]:
    """Return which of these units are stored for this step or a later one."""
    table = UNITS if kind.name == "unit" else EVENTS
    where = (table.c.rollout == kind.rollout) & (table.c.below >= kind.below)
    if table is EVENTS:
        where &= EVENTS.c.event == kind.name
    found: set[str] = set()
    for start in range(0, len(units), _PAGE):
        page = units[start : start + _PAGE]
        query = sa.select(table.c.unit).where(where, table.c.unit.in_(page))
        found.update(connection.execute(query).scalars())
    return found
