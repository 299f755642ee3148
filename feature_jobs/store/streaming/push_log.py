"""The push log of a view: accepted pushes in the ledger's database, written before they are answered.

An append is one transaction: it looks up the idempotency key, assigns the rows' numbers, writes the record and stores
the answer. The transaction locks the view's row in `push_logs`, so all processes and machines share one order. Readers
see whole records in the order of their numbers, which have no gap. Records are encrypted with their number as AAD. The
idempotency key is stored as a hash. A process that only appends needs only the right to wrap data keys, so a replica
cannot read the pushes of others.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from cluster.errors import ArtifactTampered, FalajError, InvalidRequest, RecordLogCorrupt
from cluster.ledger import Ledger
from cluster.ledger.database import is_shared, snapshot, updating
from cluster.security.encryption.envelope import ValueCipher, value_aad
from cluster.security.keys.store import KeyStore
from feature_jobs.store.catalog.protection import push_key
from feature_jobs.store.streaming.push_tables import ANSWERS, KEYS, LOGS, METADATA, RECORDS, number_bytes

REMEMBERED_S = 7 * 86_400
"""Seconds for which an idempotency key is stored after its push."""
MAX_BYTES = 8 << 30
"""Maximum size of the records of a view that no stream has stored yet."""
_LISTED = 1000
"""Number of records whose sizes are read at once."""
_PAGE_BYTES = 8 << 20
"""Size of the records that are read at once. A larger record is read alone."""


class PushLogFull(FalajError):
    """The push log has no room."""


class PushLogUnavailable(FalajError):
    """The database of the push log cannot be used now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Appended:
    """A push that is in the log."""

    first: int
    """Number of its first row."""
    answer: dict[str, Any]
    repeated: bool
    """Whether an earlier request with the same idempotency key appended it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushRecord:
    """One push: its good and its bad rows, with their numbers."""

    first: int
    rows: int
    view_version: str
    good: pa.Table
    bad: pa.Table

    @property
    def last(self) -> int:
        """Number of its last row."""
        return self.first + self.rows - 1


class _DataKey(NamedTuple):
    """The data key with which this process appends."""

    name: str
    cipher: ValueCipher
    wrapped: str


class PushLog:
    """The log of one view.

    Args:
        ledger: its database holds the log.
        view: name of the view.
        keys: wraps data keys, and unwraps them for reading.
    """

    def __init__(self, ledger: Ledger, view: str, keys: KeyStore) -> None:
        self._engine, self._view, self._keys = ledger.engine, view, keys
        self._own_key: _DataKey | None = None
        self._ciphers: dict[str, ValueCipher] = {}
        # SQLite makes a writer that waits sleep for up to 0.1 s. Writers of one process wait here instead.
        self._appending = threading.Lock()
        with ledger.writing() as connection:
            METADATA.create_all(connection)

    def append(
        self, idempotency_key: str, digest: bytes, record: PushRecord, answer: dict[str, Any]
    ) -> Appended:
        """Write a push to disk, once for each idempotency key. A repeated push returns the first one.

        Args:
            idempotency_key: the client's key.
            digest: hash of the request.
            record: the push; this call assigns `first`.
            answer: stored, and returned for a repeated push.

        Raises:
            InvalidRequest: the idempotency key was used for another push.
            PushLogFull: the log is full. Nothing was written.
            PushLogUnavailable: the database failed. The push may be in the log; repeat it with the same key.
            KeyNotFound, KeyRevoked, AccessDenied: the key store refuses the key.
        """
        key = self._data_key()
        key_hash = hashlib.blake2b(idempotency_key.encode(), digest_size=16).hexdigest()
        content = msgpack.packb([record.view_version, _to_ipc(record.good), _to_ipc(record.bad)])
        of_key = sa.and_(ANSWERS.c.view == self._view, ANSWERS.c.key_hash == key_hash)
        with self._appending, self._available(), updating(self._engine) as connection:
            log = self._lock(connection)
            if (stored := connection.execute(sa.select(ANSWERS).where(of_key)).first()) is not None:
                return _repeated(stored, digest)
            if log.bytes + len(content) > MAX_BYTES:
                raise PushLogFull(
                    f"The push log of view '{self._view}' is full. Run `python -m feature_jobs.stream source=push "
                    f"view={self._view}`, which frees it."
                )
            self._insert_record(connection, log, key, record.rows, content)
            connection.execute(
                ANSWERS.insert().values(
                    view=self._view,
                    key_hash=key_hash,
                    first=log.next,
                    digest=digest,
                    answer=msgpack.packb(answer),
                    time=time.time(),
                )
            )
        return Appended(first=log.next, answer=answer, repeated=False)

    def _insert_record(
        self, connection: sa.Connection, log: sa.Row[Any], key: _DataKey, rows: int, content: bytes
    ) -> None:
        """Encrypt and insert a record under the log's next number, with its data key."""
        sealed = key.cipher.encrypt(content, self._aad(log.next))
        of_name = sa.and_(KEYS.c.view == self._view, KEYS.c.name == key.name)
        if connection.execute(sa.select(KEYS.c.name).where(of_name)).first() is None:
            connection.execute(KEYS.insert().values(view=self._view, name=key.name, wrapped=key.wrapped))
        connection.execute(
            RECORDS.insert().values(
                view=self._view, first=log.next, rows=rows, key=key.name, bytes=len(sealed), sealed=sealed
            )
        )
        self._update(connection, next=log.next + rows, bytes=log.bytes + len(sealed))

    def hold_key(self) -> None:
        """Get the data key of this process now, so that a push needs no key store.

        Raises:
            KeyNotFound, KeyRevoked, AccessDenied, KeyStoreUnavailable: the key store gives no key.
        """
        self._data_key()

    def contains(self, first: int) -> bool:
        """Return whether the push with this number is still in the log; a stream removes it when it is in the table.

        Raises:
            PushLogUnavailable: the database failed.
        """
        query = sa.select(RECORDS.c.first).where(RECORDS.c.view == self._view, RECORDS.c.first == first)
        with self._available(), self._engine.connect() as connection:
            return connection.execute(query).first() is not None

    def next_number(self) -> int:
        """Return the number of the next row.

        Raises:
            PushLogUnavailable: the database failed.
        """
        query = sa.select(LOGS.c.next).where(LOGS.c.view == self._view)
        with self._available(), self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one_or_none() or 0)

    def records(self, after: int) -> Iterator[PushRecord]:
        """Yield the records after a number, in order.

        Raises:
            RecordLogCorrupt: a record was altered or removed.
            PushLogUnavailable: the database failed.
            AccessDenied, KeyRevoked: the key store refuses the key.
        """
        expected: int | None = None
        with self._available(), snapshot(self._engine) as connection:
            for row in self._rows(connection, after):
                if expected not in (None, row.first):
                    raise RecordLogCorrupt(
                        f"The push log of view '{self._view}' lacks the records before number {row.first}. "
                        "Restore the ledger's database from a backup."
                    )
                expected = row.first + row.rows
                yield self._decrypted(connection, row)

    def _rows(self, connection: sa.Connection, after: int) -> Iterator[sa.Row[Any]]:
        """Yield the stored rows after a number, few at a time."""
        of_view = RECORDS.c.view == self._view
        while True:
            newer = sa.select(RECORDS.c.first, RECORDS.c.bytes).where(of_view, RECORDS.c.first > after)
            listed = connection.execute(newer.order_by(RECORDS.c.first).limit(_LISTED)).all()
            if not listed:
                return
            for begin, end in _pages(listed):
                page = sa.select(RECORDS).where(of_view, RECORDS.c.first.between(begin, end))
                yield from connection.execute(page.order_by(RECORDS.c.first)).all()
            after = listed[-1].first

    def trim(self, upto: int) -> None:
        """Remove the records up to a number, expired idempotency keys, and data keys that no record needs.

        Raises:
            PushLogUnavailable: the database failed.
        """
        done = sa.and_(RECORDS.c.view == self._view, RECORDS.c.first <= upto)
        expired = sa.and_(ANSWERS.c.view == self._view, ANSWERS.c.time < time.time() - REMEMBERED_S)
        needed = sa.select(RECORDS.c.key).where(RECORDS.c.view == self._view)
        with self._appending, self._available(), updating(self._engine) as connection:
            log = self._lock(connection)
            freed = connection.execute(sa.select(sa.func.sum(RECORDS.c.bytes)).where(done)).scalar_one()
            connection.execute(RECORDS.delete().where(done))
            connection.execute(ANSWERS.delete().where(expired))
            connection.execute(KEYS.delete().where(KEYS.c.view == self._view, KEYS.c.name.not_in(needed)))
            self._update(connection, next=log.next, bytes=log.bytes - int(freed or 0))

    def _lock(self, connection: sa.Connection) -> sa.Row[Any]:
        """Lock the view's log until the transaction ends, and return its row."""
        query = sa.select(LOGS).where(LOGS.c.view == self._view).with_for_update()
        if (log := connection.execute(query).first()) is None:
            connection.execute(_create_log(connection, self._view))
            log = connection.execute(query).one()
        return log

    def _update(self, connection: sa.Connection, **values: int) -> None:
        connection.execute(LOGS.update().where(LOGS.c.view == self._view).values(**values))

    def _data_key(self) -> _DataKey:
        """Return the data key with which this process, and no other, encrypts."""
        with self._appending:
            if self._own_key is None:
                cipher, wrapped = ValueCipher.create(self._keys, push_key(self._view))
                self._own_key = _DataKey(os.urandom(8).hex(), cipher, wrapped)
            return self._own_key

    def _decrypted(self, connection: sa.Connection, row: sa.Row[Any]) -> PushRecord:
        if row.key not in self._ciphers:
            query = sa.select(KEYS.c.wrapped).where(KEYS.c.view == self._view, KEYS.c.name == row.key)
            wrapped = connection.execute(query).scalar_one_or_none() or ""
            self._ciphers[row.key] = ValueCipher.open(self._keys, push_key(self._view), wrapped)
        try:
            content = self._ciphers[row.key].decrypt(row.sealed, self._aad(row.first))
        except ArtifactTampered as error:
            raise RecordLogCorrupt(
                f"The push log of view '{self._view}' was altered at number {row.first}. "
                "Restore the ledger's database from a backup."
            ) from error
        version, good, bad = msgpack.unpackb(content)
        return PushRecord(
            first=row.first, rows=row.rows, view_version=version, good=_from_ipc(good), bad=_from_ipc(bad)
        )

    def _aad(self, first: int) -> bytes:
        return value_aad(f"push/{self._view}", number_bytes(first))

    @contextmanager
    def _available(self) -> Iterator[None]:
        """Turn the database's errors into `PushLogUnavailable`."""
        try:
            yield
        except (DBAPIError, sa.exc.TimeoutError) as error:
            reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise PushLogUnavailable(
                f"The push log of view '{self._view}' cannot be used: the ledger's database says: {reason}. A push "
                "may be stored or not; repeat it with the same idempotency_key."
            ) from error


def _create_log(connection: sa.Connection, view: str) -> sa.Insert:
    """Return the statement that creates a view's log. Another process may create it at the same time."""
    values = {"view": view, "next": 0, "bytes": 0, "imported": False}
    if not is_shared(connection):
        return LOGS.insert().values(values)  # this transaction holds the lock of all writers
    from sqlalchemy.dialects.postgresql import insert

    return insert(LOGS).values(values).on_conflict_do_nothing()


def _pages(records: Sequence[sa.Row[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last number of records that are read at once."""
    begin, size = 0, 0
    for index, record in enumerate(records):
        if size and size + record.bytes > _PAGE_BYTES:
            yield records[begin].first, records[index - 1].first
            begin, size = index, 0
        size += record.bytes
    if records:
        yield records[begin].first, records[-1].first


def _repeated(stored: sa.Row[Any], digest: bytes) -> Appended:
    if stored.digest != digest:
        raise InvalidRequest(
            "This idempotency_key was used for another push. Use a new key for each push. Repeat a key only with the "
            "same push."
        )
    return Appended(first=stored.first, answer=msgpack.unpackb(stored.answer), repeated=True)


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _from_ipc(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
