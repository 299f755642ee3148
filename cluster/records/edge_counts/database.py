"""The database of what the edges count. Its tables are no projections: no event contains them.

On PostgreSQL it is the ledger's database, which all nodes share. With SQLite there is one machine, and it is a file of
its own beside the ledger's: SQLite has one lock for all writers of a file, and an append to the ledger, such as a
rollback, must not wait for counts.

SQLite's file may be deleted, replaced or broken while processes use it. Each connection is checked before it is used,
and is replaced if the file is another one. A new connection creates missing tables. The access records that are still
in their files are read again. What older records gave is lost: the refused requests of hours before the oldest file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from cluster.ledger.database import connect, is_shared, updating, writing

METADATA = sa.MetaData()
FILE = "evidence.db"
"""Name of SQLite's file."""
SHORT_WAIT_MS = 100
_NO_FLUSH = sa.func.set_config("synchronous_commit", "off", True)
_BROKEN = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
LOG = logging.getLogger("falaj.evidence")


def evidence_engine(ledger_engine: sa.Engine) -> sa.Engine:
    """Return the engine of the tables' database.

    In SQLite's file, a commit does not wait for the disk. After a power failure, position and counts are both those of
    an earlier moment, and the records are read again.
    """
    if is_shared(ledger_engine) or not ledger_engine.url.database:
        return ledger_engine
    file = Path(ledger_engine.url.database).with_name(FILE)
    engine = connect(f"sqlite:///{file}")

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous = NORMAL")
        for statement in _create_statements(engine.dialect):
            connection.execute(statement)
        record.info["file"] = _file_id(file)

    @sa.event.listens_for(engine, "checkout")
    def require_same_file(_connection: Any, record: Any, _proxy: Any) -> None:
        if record.info["file"] != _file_id(file):
            raise sa.exc.DisconnectionError(f"{file} was replaced.")

    return engine


def ensure_tables(engine: sa.Engine) -> None:
    """Create the tables if they do not exist."""
    inspector = sa.inspect(engine)
    if all(inspector.has_table(name) for name in METADATA.tables):
        return
    with writing(engine) as connection:  # the lock: PostgreSQL fails if two processes create a table at once
        METADATA.create_all(connection)


@contextmanager
def updating_if_free(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a transaction as `updating`, but wait only `SHORT_WAIT_MS` for a lock. A stopped process may hold it.

    Raises:
        OperationalError: Another process holds the lock.
    """
    if is_shared(engine):
        with updating(engine) as connection:
            connection.execute(sa.select(sa.func.set_config("lock_timeout", f"{SHORT_WAIT_MS}ms", True)))
            yield connection
        return
    with engine.connect() as connection:
        usual_ms = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {SHORT_WAIT_MS}")
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()
        finally:
            connection.rollback()
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {usual_ms}")


def upsert(table: sa.Table, connection: sa.Connection) -> Any:
    """Return an `INSERT` into a table, with PostgreSQL's and SQLite's `ON CONFLICT`."""
    return postgresql.insert(table) if is_shared(connection) else sqlite.insert(table)


def do_not_flush(connection: sa.Connection) -> None:
    """Let PostgreSQL's commit of this transaction not wait for the disk, as in SQLite's file."""
    if is_shared(connection):
        connection.execute(sa.select(_NO_FLUSH))


def remove_if_broken(engine: sa.Engine, error: sa.exc.DatabaseError) -> None:
    """Remove SQLite's file if the error says that it is no database any more. The next connection creates another."""
    if getattr(error.orig, "sqlite_errorname", "") not in _BROKEN or not engine.url.database:
        return
    LOG.error("%s is broken. It is created anew, and the access records are read again.", FILE)
    for suffix in ("", "-wal", "-shm"):
        Path(f"{engine.url.database}{suffix}").unlink(missing_ok=True)


def _create_statements(dialect: sa.Dialect) -> list[str]:
    tables = METADATA.sorted_tables
    creations = [CreateTable(table, if_not_exists=True).compile(dialect=dialect) for table in tables]
    creations += [
        CreateIndex(index, if_not_exists=True).compile(dialect=dialect)
        for table in tables
        for index in table.indexes
    ]
    return [str(creation) for creation in creations]


def _file_id(file: Path) -> tuple[int, int] | None:
    """Return what tells a file from another one of the same name; None if there is none."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
