"""The ledger's tables in SQLite (default) or PostgreSQL (by URL), and its write lock.

SQLite locks with BEGIN IMMEDIATE, and PostgreSQL with an advisory lock that ends with the transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from cluster.errors import ConfigError
from cluster.ledger.chain import Entry

_LOCK_KEY = 0x0FA1A7
_LOCK_NOT_AVAILABLE = "55P03"
"""PostgreSQL's error code of a lock timeout."""
_TIMEOUTS = {
    "connect_timeout": "10",
    "tcp_user_timeout": "10000",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
}
"""Parameters of libpq that end a connection about 10 s after its network was cut. By default that takes 15 minutes or
more, and a command or an edge would hang as long."""
_SERVER_TIMEOUTS = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10s",
}
"""Settings with which PostgreSQL ends the connection of a machine that died, and with it the locks of its transaction.
They are set with a query, because PgBouncer refuses them in `options`. Through a pooler they apply to its connection to
the server, where they do no harm."""
_LIMITS = {"lock_timeout": "10s", "idle_in_transaction_session_timeout": "30s"}
"""Settings of one transaction that writes: how long it waits for a lock, and how long it may hold one while idle."""

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
POSITIONS = sa.Table(
    "projection_positions",
    METADATA,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
)
_TYPE_AND_SEQ = sa.Index("ix_events_type_seq", EVENTS.c.type, EVENTS.c.seq).ddl_if(dialect="postgresql")
"""SQLite needs no such index, because its index of `type` contains the primary key."""


def connect(url: str) -> sa.Engine:
    """Return an engine whose transactions work as `writing` needs them."""
    is_sqlite = url.startswith("sqlite")
    engine = sa.create_engine(
        url, pool_pre_ping=not is_sqlite, connect_args={} if is_sqlite else timeouts(sa.engine.make_url(url))
    )
    if engine.dialect.name == "sqlite":

        @sa.event.listens_for(engine, "connect")
        def configure(connection: Any, _record: Any) -> None:
            # The driver's implicit BEGIN would take the write lock only after the head is read.
            connection.isolation_level = None
            connection.execute("PRAGMA busy_timeout = 30000")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")

    else:

        @sa.event.listens_for(engine, "connect")
        def limit(connection: Any, _record: Any) -> None:
            connection.autocommit = True  # so that the query leaves no open transaction
            connection.execute(*_set(_SERVER_TIMEOUTS, is_local=False))
            connection.autocommit = False

    return engine


def is_shared(engine: sa.Engine | sa.Connection) -> bool:
    """Return whether other machines can reach the database: PostgreSQL, in contrast to SQLite."""
    return engine.dialect.name == "postgresql"


def timeouts(url: sa.engine.URL, **shorter: str) -> dict[str, str]:
    """Return the timeouts of a connection that the URL does not set itself.

    Args:
        url: URL of the database.
        shorter: Parameters of libpq that replace the defaults.
    """
    return {name: value for name, value in {**_TIMEOUTS, **shorter}.items() if name not in url.query}


def _set(settings: dict[str, str], *, is_local: bool) -> tuple[str, list[Any]]:
    """Return a query of PostgreSQL's driver that sets settings, and its parameters.

    Args:
        settings: Values by name.
        is_local: Whether they end with the transaction.
    """
    calls = ", ".join(["set_config(%s, %s, %s)"] * len(settings))
    parameters = [value for name, text in settings.items() for value in (name, text, is_local)]
    return f"SELECT {calls}", parameters


def require_tls(url: str) -> None:
    """Require a verified TLS connection to a database on another machine.

    Raises:
        ConfigError: The URL does not ask for one.
    """
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


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that holds the ledger's write lock. It commits at the end, except after an exception.

    Raises:
        OperationalError: Another process holds the lock for longer than 10 s (SQLite: 30 s).
    """
    with updating(engine) as connection:
        if is_shared(connection):
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
        yield connection


@contextmanager
def updating(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction for tables beside the ledger's. It commits at the end, except after an exception.

    SQLite has one lock for all writers. On PostgreSQL the caller locks the rows that it selects `with_for_update`, so
    it does not wait for writers of the ledger.

    Raises:
        OperationalError: As for `writing`.
    """
    with engine.connect() as connection, _explained_lock_timeout():
        if is_shared(connection):
            query, parameters = _set(_LIMITS, is_local=True)
            connection.exec_driver_sql(query, tuple(parameters))
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection
        connection.commit()


@contextmanager
def _explained_lock_timeout() -> Iterator[None]:
    """Add to the error of a lock timeout what the operator can do."""
    try:
        yield
    except sa.exc.OperationalError as error:
        if getattr(error.orig, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
            error.add_detail(
                f"Another process has held a lock of the ledger's database for {_LIMITS['lock_timeout']}, so nothing "
                "was changed. Try again. The view pg_locks names the process that holds it."
            )
        raise


@contextmanager
def snapshot(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction that reads one state of the database, whatever others write meanwhile."""
    with engine.connect() as connection:
        if is_shared(connection):
            connection.execution_options(isolation_level="REPEATABLE READ")
        else:
            connection.exec_driver_sql("BEGIN")
        yield connection


def create_tables(connection: sa.Connection) -> None:
    """Create the tables and indexes that do not exist, also in a database of an older release."""
    METADATA.create_all(connection)
    if is_shared(connection):
        _TYPE_AND_SEQ.create(connection, checkfirst=True)


def to_entry(row: sa.Row[Any]) -> Entry:
    """Return a row of the events' table as an entry."""
    return Entry(
        seq=row.seq,
        time=row.time,
        type=row.type,
        actor=row.actor,
        payload=json.loads(row.payload),
        prev_hash=row.prev_hash,
        hash=row.hash,
    )
