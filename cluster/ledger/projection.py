"""Tables that are built from the ledger's events and can be rebuilt at any time.

A projection is in the ledger's database. It also stores its position: the `seq` up to which it has applied events. One
transaction updates rows and position, so a crash cannot separate them. Every read first applies the new events of the
projection's types, in short transactions, so that writers do not wait long.

Two releases can share one ledger, and then they also share its projections. So if a release stores other rows for the
same events, it must give the projection and the tables new names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa

from cluster.ledger.chain import Entry
from cluster.ledger.database import POSITIONS
from cluster.ledger.following import catch_up, is_behind
from cluster.ledger.store import Ledger


class Projection:
    """Tables that are kept up to date with the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        name: str,
        metadata: sa.MetaData,
        wanted: Callable[[str], bool],
        apply: Callable[[sa.Connection, Entry], None],
    ) -> None:
        """Create the tables if they do not exist.

        Args:
            ledger: Source of the events.
            name: Name of the projection, unique in the ledger.
            metadata: The projection's tables.
            wanted: Returns whether the projection depends on events of a type.
            apply: Applies one event to the tables. It must ignore unknown events.
        """
        self._ledger = ledger
        self._name = name
        self._metadata = metadata
        self._wanted = wanted
        self._apply = apply
        if not self._has_tables(ledger.engine):
            with ledger.writing() as connection:
                if not self._has_tables(connection):
                    self._create(connection)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Yield a connection to the tables, after all current events are applied to them."""
        with self._ledger.engine.connect() as connection:
            behind = is_behind(connection, self._name, self._wanted)
        if behind:
            self._catch_up()
        with self._ledger.engine.connect() as connection:
            yield connection

    def rebuild(self) -> None:
        """Drop the tables and rebuild them from the first event."""
        with self._ledger.writing() as connection:
            self._create(connection)
        self._catch_up()

    def _has_tables(self, bind: sa.Engine | sa.Connection) -> bool:
        return self._metadata.tables.keys() <= set(sa.inspect(bind).get_table_names())

    def _create(self, connection: sa.Connection) -> None:
        """Create empty tables, and delete the position, so that all events will be applied."""
        self._metadata.drop_all(connection)
        self._metadata.create_all(connection)
        connection.execute(POSITIONS.delete().where(POSITIONS.c.name == self._name))

    def _catch_up(self) -> None:
        catch_up(self._ledger.engine, self._name, wanted=self._wanted, apply=self._apply_all)

    def _apply_all(self, connection: sa.Connection, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._apply(connection, entry)
