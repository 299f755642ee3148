"""The tables of push logs in the ledger's database, and the import of a log that an older release kept in LMDB.

The tables are not projections: no event contains a push, so they cannot be rebuilt from the ledger.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import lmdb
import msgpack
import sqlalchemy as sa

from cluster.errors import Inconsistent
from cluster.ledger import Ledger

METADATA = sa.MetaData()
_VIEW = sa.String(256)
LOGS = sa.Table(
    "push_logs",
    METADATA,
    sa.Column("view", _VIEW, primary_key=True),
    sa.Column("next", sa.BigInteger, nullable=False),  # number of the next row
    sa.Column("bytes", sa.BigInteger, nullable=False),  # size of all records
    sa.Column("imported", sa.Boolean, nullable=False),  # whether the log began in LMDB
)
RECORDS = sa.Table(
    "push_records",
    METADATA,
    sa.Column("view", _VIEW, primary_key=True),
    sa.Column("first", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("key", sa.String(32), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
)
KEYS = sa.Table(
    "push_keys",
    METADATA,
    sa.Column("view", _VIEW, primary_key=True),
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("wrapped", sa.Text, nullable=False),
)
ANSWERS = sa.Table(
    "push_answers",
    METADATA,
    sa.Column("view", _VIEW, primary_key=True),
    sa.Column("key_hash", sa.String(32), primary_key=True),
    sa.Column("first", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("answer", sa.LargeBinary, nullable=False),
    sa.Column("time", sa.Float(53), nullable=False),  # seconds since 1970, by the writer's clock
    sa.Index("ix_push_answers_view_time", "view", "time"),
)
_NEXT, _RECORD, _KEY, _ANSWER, _AGE = b"next", b"r", b"k", b"i", b"t"
_AGE_BYTES = len(_AGE) + 8


def pushed_views(engine: sa.Engine) -> list[str]:
    """Return the views that have a push log."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(LOGS.name):
            return []
        return list(connection.execute(sa.select(LOGS.c.view)).scalars())


def number_bytes(number: int) -> bytes:
    """Return a row's number as the AAD of its record has it: 8 bytes, big-endian."""
    return struct.pack(">Q", number)


def import_lmdb_log(ledger: Ledger, view: str, folder: Path) -> None:
    """Move a push log of an older release into the database, and delete its folder.

    Records are moved as they are, because their AAD has no path. A killed call can be repeated: the records are
    imported in one transaction, and then only the folder is left.

    Args:
        ledger: its database takes the log.
        view: name of the view.
        folder: `push/<view>`, with an LMDB database or not.

    Raises:
        Inconsistent: the database has another log of the view. Nothing was changed.
    """
    if not (folder / "data.mdb").exists():
        return
    with ledger.writing() as connection:
        METADATA.create_all(connection)
        log = connection.execute(sa.select(LOGS.c.imported).where(LOGS.c.view == view)).first()
        if log is None:
            _import(connection, view, folder)
        elif not log.imported:
            raise Inconsistent(
                f"View '{view}' has a push log in the ledger's database, and another one of an older release in "
                f"{folder}. Pushes in that folder are not in the table. Nothing was changed; keep the folder, and push "
                "its rows again from their source."
            )
    shutil.rmtree(folder, ignore_errors=True)


def import_lmdb_logs(ledger: Ledger, folder: Path) -> None:
    """Import all push logs that an older release left in a folder, before anybody pushes into new ones.

    Args:
        ledger: its database takes the logs.
        folder: `push`, with one folder per view.

    Raises:
        Inconsistent: the database has another log of a view.
    """
    for data in sorted(folder.glob("*/data.mdb")):
        import_lmdb_log(ledger, data.parent.name, data.parent)


def _import(connection: sa.Connection, view: str, folder: Path) -> None:
    ages: dict[bytes, float] = {}
    next_number, size = 0, 0
    with lmdb.open(str(folder), readonly=True) as environment, environment.begin() as transaction:
        with transaction.cursor() as cursor:
            if cursor.set_range(_AGE):
                for key in cursor.iternext(keys=True, values=False):
                    if bytes(key).startswith(_AGE):
                        ages[bytes(key[_AGE_BYTES:])] = struct.unpack(">d", key[1:_AGE_BYTES])[0]
        for key, value in transaction.cursor():
            if key == _NEXT:
                next_number = struct.unpack(">Q", value)[0]
            elif key.startswith(_RECORD):
                rows, name, sealed = msgpack.unpackb(value)
                size += len(sealed)
                connection.execute(
                    RECORDS.insert().values(
                        view=view,
                        first=struct.unpack(">Q", key[1:])[0],
                        rows=rows,
                        key=name.hex(),
                        bytes=len(sealed),
                        sealed=sealed,
                    )
                )
            elif key.startswith(_KEY):
                values = {"view": view, "name": key[1:].hex(), "wrapped": value.decode()}
                connection.execute(KEYS.insert().values(**values))
            elif key.startswith(_ANSWER):
                first, digest, answer = msgpack.unpackb(value)
                connection.execute(
                    ANSWERS.insert().values(
                        view=view,
                        key_hash=key[1:].hex(),
                        first=first,
                        digest=digest,
                        answer=msgpack.packb(answer),
                        time=ages[key],
                    )
                )
    connection.execute(LOGS.insert().values(view=view, next=next_number, bytes=size, imported=True))
