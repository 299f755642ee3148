"""Tables that are built from events and can be dropped at any time.

A projection keeps its position beside its rows, in the ledger's own database, and moves both in one transaction: a
crash in between leaves it where it was. Every read catches up first.
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
    """Named tables that follow the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        name: str,
        metadata: sa.MetaData,
        apply: Callable[[sa.Connection, Entry], None],
    ) -> None:
        """Make the tables where there are none.

        Args:
            ledger: the events.
            name: of the projection, unique in the ledger.
            metadata: its tables.
            apply: writes one event into them, and passes over events it does not know.
        """
        self._ledger = ledger
        self._name = name
        self._metadata = metadata
        self._apply = apply
        with ledger.writing() as connection:
            self._create(connection)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection whose view of the tables has every event up to now."""
        if self._position() < self._ledger.head():
            self._catch_up()
        with self._ledger.engine.connect() as connection:
            yield connection

    def rebuild(self) -> None:
        """Drop the tables and fill them again from the first event."""
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
