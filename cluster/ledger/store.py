"""The ledger's table in SQLite (default) or PostgreSQL (by URL).

An append takes the ledger's write lock, reads the head, and links the new entry to it, in one transaction. So
concurrent writers wait for each other and never fork the chain. SQLite locks with BEGIN IMMEDIATE, and PostgreSQL with
an advisory lock that ends with the transaction.

The ledger's time never goes backwards: an event of a writer whose clock is behind gets the time of the event before it.
So events in the order of `seq` are in the order of time too, whichever machine wrote them.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cluster.errors import ConfigError
from cluster.ledger.chain import GENESIS, Entry, build_entry, canonical, to_json
from cluster.ledger.checkpoint import Signer, checkpoint, load_signer
from cluster.ledger.events import LedgerEvent, Subject, UnknownEvent, is_known, require_known
from cluster.settings import PlatformConfig, Tier
from cluster.storage import is_uri, layout, local

_LOCK_KEY = 0x0FA1A7
_PAGE = 1000

METADATA = sa.MetaData()
EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column(
        "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False
    ),
    sa.Column("time", sa.String(32), nullable=False),
    sa.Column("type", sa.String(64), nullable=False, index=True),
    sa.Column("actor", sa.String(256), nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("prev_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
)


_HEAD = sa.select(sa.func.coalesce(sa.func.max(EVENTS.c.seq), 0))
"""Built once, because building the query takes longer than running it, and the edge runs it many times a second."""
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
        self._engine = _engine(url)
        self._signer = signer
        self._checkpoint_every = checkpoint_every
        self._clock = clock
        with self.writing() as connection:
            METADATA.create_all(connection)

    @property
    def engine(self) -> sa.Engine:
        """The database engine, for projections in the same database."""
        return self._engine

    def append(self, event: LedgerEvent, *, actor: str) -> Entry:
        """Append one event durably, and a checkpoint if one is due."""
        payload = to_json(event.payload())
        with self.writing() as connection:
            entry = self._append(connection, event.type, actor, payload)
            if self._signer is not None and entry.seq % self._checkpoint_every == 0:
                mark = checkpoint(self._signer, entry)
                self._append(connection, mark.type, "system:ledger", mark.payload())
        return entry

    def entries(self, kind: type[LedgerEvent] | None = None, *, after: int = 0) -> Iterator[Entry]:
        """Yield the entries with `seq > after` in order, all or of one type.

        They are read in pages, so that writers are not blocked.
        """
        while True:
            query = sa.select(EVENTS).where(EVENTS.c.seq > after).order_by(EVENTS.c.seq).limit(_PAGE)
            if kind is not None:
                query = query.where(EVENTS.c.type == kind.__name__)
            with self._engine.connect() as connection:
                rows = connection.execute(query).all()
            for row in rows:
                yield _entry(row)
            if len(rows) < _PAGE:
                return
            after = rows[-1].seq

    def head(self) -> int:
        """Return the last seq, or 0 if there are no events."""
        with self._engine.connect() as connection:
            return int(connection.execute(_HEAD).scalar_one())

    def require_known(self, subject: Subject) -> None:
        """Require that this release knows all the ledger's event types of a subject, before a command changes it.

        Raises:
            ReleaseTooOld: A newer release wrote an unknown event type of the subject. The message names the first one.
        """
        with self._engine.connect() as connection:
            types = connection.execute(sa.select(EVENTS.c.type).distinct()).scalars().all()
        for type_name in sorted(types):
            if not is_known(type_name):
                require_known(UnknownEvent(stored_type=type_name, content={}), subject)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def _append(
        self, connection: sa.Connection, type_name: str, actor: str, payload: dict[str, Any]
    ) -> Entry:
        last = connection.execute(_LAST).first()
        now = self._clock().isoformat(timespec="microseconds")
        entry = build_entry(
            seq=last.seq + 1 if last else 1,
            # All times have the same form, so text compares as the times do.
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
        return entry

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Open a transaction that holds the ledger's write lock. It commits at the end, except after an exception."""
        with self._engine.connect() as connection:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
            yield connection
            connection.commit()


def open_ledger(config: PlatformConfig) -> Ledger:
    """Open the configured ledger. It signs checkpoints once `cluster.up` has created the key.

    Raises:
        ConfigError: A remote storage root has no ledger database, or the tier requires TLS and the URL does not.
    """
    storage = layout(config.storage)
    url = config.ledger.url
    if url is None:
        if is_uri(storage.root):
            raise ConfigError(
                f"storage.root {storage.root} is remote: set ledger.url to a PostgreSQL database."
            )
        Path(storage.root).mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{storage.ledger_path}"
    elif config.tier is Tier.enterprise_gpu:
        _require_tls(url)
    signer = None if is_uri(storage.root) else load_signer(local(storage.keys))
    return Ledger(url, signer=signer, checkpoint_every=config.ledger.checkpoint_every)


def _require_tls(url: str) -> None:
    address = sa.engine.make_url(url)
    if (
        address.host in (None, "", "localhost", "127.0.0.1", "::1")
        or address.query.get("sslmode") == "verify-full"
    ):
        return
    raise ConfigError(
        f"The ledger's database at {address.host} would be reached without a verified TLS connection. Add "
        "sslmode=verify-full and sslrootcert=/path/to/ca.pem to ledger.url."
    )


def _entry(row: sa.Row[Any]) -> Entry:
    return Entry(
        seq=row.seq,
        time=row.time,
        type=row.type,
        actor=row.actor,
        payload=json.loads(row.payload),
        prev_hash=row.prev_hash,
        hash=row.hash,
    )


def _engine(url: str) -> sa.Engine:
    engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def configure(connection: Any, _record: Any) -> None:
            # The driver's implicit BEGIN would take the write lock only after the head is read.
            connection.isolation_level = None
            connection.execute("PRAGMA busy_timeout = 30000")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")

    return engine
