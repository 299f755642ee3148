"""Tables that are built from the ledger's events and can be rebuilt at any time.

A projection is in the ledger's database. It also stores its position: the number of the last event that it has applied.
One transaction updates rows and position, so after a crash they still agree. Every read first applies the new events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from cluster.ledger.chain import Entry
from cluster.ledger.store import Ledger

_POSITIONS_METADATA = sa.MetaData()
POSITIONS = sa.Table(
    "projection_positions",
    _POSITIONS_METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
)


class Projection:
    """Tables that are kept up to date with the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        name: str,
        metadata: sa.MetaData,
        apply: Callable[[sa.Connection, Entry], None],
    ) -> None:
        """Create the tables if they do not exist.

        Args:
            ledger: Source of the events.
            name: Name of the projection, unique in the ledger.
            metadata: Its tables.
            apply: Applies one event to the tables. It must ignore events that it does not know.
        """
        self._ledger = ledger
        self._name = name
        self._metadata = metadata
        self._apply = apply
        with ledger.writing() as connection:
            self._create(connection)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Yield a connection to the tables, after all current events are applied to them."""
        if self._position() < self._ledger.head():
            self._catch_up()
        with self._ledger.engine.connect() as connection:
            yield connection

    def rebuild(self) -> None:
        """Drop the tables and rebuild them from the first event."""
        with self._ledger.writing() as connection:
            self._metadata.drop_all(connection)
            connection.execute(POSITIONS.delete().where(POSITIONS.c.name == self._name))
            self._create(connection)
        self._catch_up()

    def _create(self, connection: sa.Connection) -> None:
        _POSITIONS_METADATA.create_all(connection)
        self._metadata.create_all(connection)

    def _position(self) -> int:
        with self._ledger.engine.connect() as connection:
            return self._position_in(connection)

    def _position_in(self, connection: sa.Connection) -> int:
        query = sa.select(POSITIONS.c.seq).where(POSITIONS.c.name == self._name)
        return int(connection.execute(query).scalar_one_or_none() or 0)

    def _catch_up(self) -> None:
        with self._ledger.writing() as connection:
            position = start = self._position_in(connection)
            for entry in self._ledger.entries(after=start):
                self._apply(connection, entry)
                position = entry.seq
            connection.execute(POSITIONS.delete().where(POSITIONS.c.name == self._name))
            connection.execute(POSITIONS.insert().values(name=self._name, seq=position))
