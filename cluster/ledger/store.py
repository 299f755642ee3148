"""The ledger: appends events to the table in its database, and reads them.

An append takes the ledger's write lock, reads the head, and links the new entry to it, in one transaction. So
concurrent writers wait for each other and never fork the chain.

The ledger's time never goes backwards. If a writer's clock is behind, its event gets the time of the previous event. So
the order of `seq` is also the order of time, even if several machines write.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cluster.ledger import index
from cluster.ledger.announcements import announce
from cluster.ledger.chain import GENESIS, Entry, build_entry, canonical, to_json
from cluster.ledger.checkpoint import Signer, checkpoint, load_signer
from cluster.ledger.database import EVENTS, connect, create_tables, require_tls, to_entry, writing
from cluster.ledger.events import (
    CheckpointSigned,
    Json,
    LedgerEvent,
    Subject,
    UnknownEvent,
    is_known,
    require_known,
)
from cluster.ledger.following import HEAD, catch_up, new_entries, newest_by_type, position_of
from cluster.settings import PlatformConfig, Tier
from cluster.storage import layout, local

_PAGE = 1000
_FIRST_PAGE = 20
"""Number of events of a lookup's first page. It is small, because many lookups need only one event."""

_LAST = sa.select(EVENTS.c.seq, EVENTS.c.time, EVENTS.c.hash).order_by(EVENTS.c.seq.desc()).limit(1)


def utc_now() -> dt.datetime:
    """Return this machine's time, in UTC."""
    return dt.datetime.now(dt.UTC)


class Ledger:
    """Append-only events in a SQL database."""

    def __init__(
        self,
        url: str,
        *,
        signer: Signer | None = None,
        checkpoint_every: int = 50,
        clock: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        """Connect, and create the table if it does not exist.

        Args:
            url: SQLAlchemy URL, `sqlite:///…` or `postgresql+psycopg://…`.
            signer: Signs a checkpoint after every `checkpoint_every` events. None signs no checkpoints.
            checkpoint_every: Number of events from one checkpoint to the next.
            clock: Returns this writer's time, in UTC.
        """
        self._engine = connect(url)
        self._signer = signer
        self._checkpoint_every = checkpoint_every
        self._signed_interval = 0
        self._clock = clock
        with self.writing() as connection:
            is_indexed = sa.inspect(connection).has_table(index.NAME)
            create_tables(connection)
            if not is_indexed:
                index.start(connection)

    @property
    def engine(self) -> sa.Engine:
        """The database engine, for projections in the same database."""
        return self._engine

    def append(self, event: LedgerEvent, *, actor: str) -> Entry:
        """Append one event durably, and a checkpoint if one is due."""
        with self.writing() as connection:
            return self._append_with_checkpoint(connection, event, actor)

    def append_once(self, event: LedgerEvent, *, actor: str, **values: Json) -> Entry | None:
        """Append an event, unless the ledger has one of its type with these values.

        Of several callers at the same time, one appends the event.

        Args:
            event: The event.
            actor: Who acts.
            values: Maps field to value. `index.KEYS` lists the combinations of fields that can be looked up.

        Returns:
            The entry, or None if there was such an event.
        """
        key = index.lookup_key(event.type, "", values)
        while True:
            self._update_index()
            with self.writing() as connection:
                if position_of(connection, index.NAME) < int(connection.execute(HEAD).scalar_one()):
                    continue  # an older release has appended an event that is not in the index yet
                if connection.execute(index.page(key, beyond=None, newest_first=False, limit=1)).first():
                    return None
                return self._append_with_checkpoint(connection, event, actor)

    def append_unless_changed(
        self,
        events: Sequence[LedgerEvent],
        *,
        actor: str,
        since: int,
        types: Callable[[str], bool],
        concerns: Callable[[Entry], bool],
    ) -> list[Entry] | None:
        """Append several events in one transaction, unless the ledger has got an event that the caller did not know.

        Of several callers that have read the same state, one appends its events.

        Args:
            events: The events.
            actor: Who acts.
            since: `head()` before the caller read the state that its events depend on.
            types: Returns whether events of a type can change this state.
            concerns: Returns whether an event of such a type changes it.

        Returns:
            The entries, or None if there was such an event. Then nothing was appended.
        """
        with self.writing() as connection:
            if any(concerns(entry) for entry in new_entries(connection, since, types)):
                return None
            return [self._append_with_checkpoint(connection, event, actor) for event in events]

    def _append_with_checkpoint(self, connection: sa.Connection, event: LedgerEvent, actor: str) -> Entry:
        entry = self._append(connection, event.type, actor, to_json(event.payload()))
        if self._signer is not None and self._is_checkpoint_due(connection, entry.seq):
            mark = checkpoint(self._signer, entry)
            self._append(connection, mark.type, "system:ledger", mark.payload())
        announce(connection)
        return entry

    def _is_checkpoint_due(self, connection: sa.Connection, seq: int) -> bool:
        """Return whether a multiple of `checkpoint_every` was passed since the last checkpoint.

        Processes on other nodes have no key. The next event of a process with the key makes up for theirs.
        """
        interval = seq // self._checkpoint_every
        if interval == self._signed_interval:
            return False
        query = sa.select(sa.func.max(EVENTS.c.seq)).where(EVENTS.c.type == CheckpointSigned.__name__)
        last = int(connection.execute(query).scalar_one() or 0)
        if interval > last // self._checkpoint_every:
            return True
        self._signed_interval = interval
        return False

    def entries(self, kind: type[LedgerEvent] | None = None, *, after: int = 0) -> Iterator[Entry]:
        """Yield the entries with `seq > after` in order; with `kind`, only the entries of that type.

        The entries are read in pages, so that writers are not blocked.
        """
        while True:
            query = sa.select(EVENTS).where(EVENTS.c.seq > after).order_by(EVENTS.c.seq).limit(_PAGE)
            if kind is not None:
                query = query.where(EVENTS.c.type == kind.__name__)
            with self._engine.connect() as connection:
                rows = connection.execute(query).all()
            for row in rows:
                yield to_entry(row)
            if len(rows) < _PAGE:
                return
            after = rows[-1].seq

    def find(
        self, kind: type[LedgerEvent], *, having: str = "", newest_first: bool = False, **values: Json
    ) -> Iterator[Entry]:
        """Find the entries of one type whose payload has these values, and yield them in order. Uses the event index.

        Args:
            kind: Type of the events.
            having: If set, find only events in which this field is not empty.
            newest_first: Start with the newest event.
            values: Maps field to value. `index.KEYS` lists the combinations of fields that can be looked up.
        """
        key = index.lookup_key(kind.__name__, having, values)
        self._update_index()
        beyond, limit = None, _FIRST_PAGE
        while True:
            query = index.page(key, beyond=beyond, newest_first=newest_first, limit=limit)
            with self._engine.connect() as connection:
                rows = connection.execute(query).all()
            for row in rows:
                yield to_entry(row)
            if len(rows) < limit:
                return
            beyond, limit = rows[-1].seq, _PAGE

    def newest(self, kind: type[LedgerEvent], *, having: str = "", **values: Json) -> Entry | None:
        """Return the newest entry of one type with these values, or None if there is none."""
        return next(self.find(kind, having=having, newest_first=True, **values), None)

    def get(self, seq: int) -> Entry | None:
        """Return the entry with a `seq`, or None if there is none."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(EVENTS).where(EVENTS.c.seq == seq)).first()
        return None if row is None else to_entry(row)

    def last(self, kind: type[LedgerEvent]) -> Entry | None:
        """Return the last entry of one type, or None if there is none."""
        query = sa.select(sa.func.max(EVENTS.c.seq)).where(EVENTS.c.type == kind.__name__)
        with self._engine.connect() as connection:
            seq = connection.execute(query).scalar_one()
        return None if seq is None else self.get(seq)

    def head(self) -> int:
        """Return the last seq, or 0 if there are no events."""
        with self._engine.connect() as connection:
            return int(connection.execute(HEAD).scalar_one())

    def require_known(self, subject: Subject) -> None:
        """Require that this release knows all event types of a subject that the ledger has. Call it before a change.

        Raises:
            ReleaseTooOld: A newer release wrote an unknown event type of the subject. The message names the type.
        """
        with self._engine.connect() as connection:
            types = newest_by_type(connection)
        for type_name in sorted(types):
            if not is_known(type_name):
                require_known(UnknownEvent(stored_type=type_name, content={}), subject)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def writing(self) -> AbstractContextManager[sa.Connection]:
        """Begin a transaction with the ledger's write lock. It is committed at the end, but not after an exception."""
        return writing(self._engine)

    def _update_index(self) -> None:
        with self._engine.connect() as connection:
            is_current = position_of(connection, index.NAME) >= int(connection.execute(HEAD).scalar_one())
        if not is_current:
            catch_up(self._engine, index.NAME, wanted=index.is_indexed, apply=index.add)

    def _append(
        self, connection: sa.Connection, type_name: str, actor: str, payload: dict[str, Any]
    ) -> Entry:
        last = connection.execute(_LAST).first()
        now = self._clock().isoformat(timespec="microseconds")
        entry = build_entry(
            seq=last.seq + 1 if last else 1,
            # All times have the same format, so their order as text is their order in time.
            time=max(now, last.time) if last else now,
            type=type_name,
            actor=actor,
            payload=payload,
            prev_hash=last.hash if last else GENESIS,
        )
        connection.execute(
            EVENTS.insert().values(
                seq=entry.seq,
                time=entry.time,
                type=entry.type,
                actor=entry.actor,
                payload=canonical(entry.payload).decode(),
                prev_hash=entry.prev_hash,
                hash=entry.hash,
            )
        )
        index.add_appended(connection, entry)
        return entry


def open_ledger(config: PlatformConfig) -> Ledger:
    """Open the configured ledger. It signs checkpoints if `cluster.up` has created the key for them.

    Raises:
        ConfigError: The tier requires TLS to the database, but the URL does not ask for it.
    """
    storage = layout(config.storage)
    url = config.ledger.url
    if url is None:
        Path(storage.disk).mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{storage.ledger_path}"
    elif config.tier is Tier.enterprise_gpu:
        require_tls(url)
    signer = load_signer(local(storage.keys))
    return Ledger(url, signer=signer, checkpoint_every=config.ledger.checkpoint_every)
