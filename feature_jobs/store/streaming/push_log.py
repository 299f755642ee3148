"""The push log of a view: what was accepted, on disk before it is answered, in one order for all processes.

LMDB, because what an append must do at once is a transaction there: look whether the idempotency key was used, give out
the rows' numbers, write the record, remember the answer, and reach the disk (an fsync). Readers see whole records in
the order of their numbers, which have no gap. Records are encrypted and bound to their numbers; the idempotency key is
kept as a hash. Whoever appends needs to wrap only, so a replica cannot read what others pushed.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import pyarrow as pa

from cluster.errors import ArtifactTampered, FalajError, InvalidRequest, RecordLogCorrupt
from cluster.security.encryption.envelope import ValueCipher, place_of
from cluster.security.keys.store import KeyStore
from feature_jobs.store.catalog.protection import push_key

REMEMBERED_S = 7 * 86_400
"""So long an idempotency key is known after the push."""
MAP_SIZE_BYTES = 8 << 30
"""Upper bound of a log; the file is sparse, and streaming its records into the table frees their pages."""
_NEXT = b"next"
_RECORD, _KEY, _ANSWER, _AGE = b"r", b"k", b"i", b"t"
_MAX = 2**64 - 1


class PushLogFull(FalajError):
    """The push log has no room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Appended:
    """A push that is in the log."""

    first: int
    """Number of its first row."""
    answer: dict[str, Any]
    again: bool
    """Whether it was there already."""


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


class PushLog:
    """The log of one view; a folder may be opened once in a process.

    Args:
        folder: `push/<view>`.
        view: its name.
        keys: wraps data keys; unwraps them for who reads.
    """

    def __init__(self, folder: Path, view: str, keys: KeyStore) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._view, self._keys, self._path = view, keys, folder
        self._env = lmdb.open(str(folder), map_size=MAP_SIZE_BYTES, mode=0o600, readahead=False)
        self._writing: tuple[bytes, ValueCipher, bytes] | None = None
        self._ciphers: dict[bytes, ValueCipher] = {}

    def append(
        self, idempotency_key: str, digest: bytes, record: PushRecord, answer: dict[str, Any]
    ) -> Appended:
        """Write a push to disk, once for an idempotency key; what came first is what counts.

        Args:
            idempotency_key: of the client.
            digest: of what it sent.
            record: `first` is given out here.
            answer: to be given again.

        Raises:
            InvalidRequest: the key was used for something else.
            PushLogFull: nothing was written.
            KeyNotFound, KeyRevoked, AccessDenied: as the key store says.
        """
        name, cipher, wrapped = self._data_key()
        known = _ANSWER + hashlib.blake2b(idempotency_key.encode(), digest_size=16).digest()
        content = msgpack.packb([record.view_version, _to_ipc(record.good), _to_ipc(record.bad)])
        now = time.time()
        try:
            with self._env.begin(write=True) as transaction:
                if (found := transaction.get(known)) is not None:
                    return _again(msgpack.unpackb(found), digest)
                first = _number(transaction.get(_NEXT))
                sealed = cipher.encrypt(content, self._place(first))
                transaction.put(_KEY + name, wrapped)
                transaction.put(_RECORD + _bytes(first), msgpack.packb([record.rows, name, sealed]))
                transaction.put(known, msgpack.packb([first, digest, answer]))
                transaction.put(_AGE + struct.pack(">d", now) + known, b"")
                transaction.put(_NEXT, _bytes(first + record.rows))
        except lmdb.MapFullError as error:
            raise PushLogFull(
                f"The push log of view '{self._view}' is full. Run `python -m feature_jobs.stream source=push "
                f"view={self._view}`, which frees it."
            ) from error
        return Appended(first=first, answer=answer, again=False)

    def holds(self, first: int) -> bool:
        """Whether the push with that number was not yet taken into the table and settled."""
        with self._env.begin() as transaction:
            return transaction.get(_RECORD + _bytes(first)) is not None

    def next_number(self) -> int:
        """The number that the next row will get."""
        with self._env.begin() as transaction:
            return _number(transaction.get(_NEXT))

    def records(self, after: int) -> Iterator[PushRecord]:
        """The records behind a number, in order.

        Raises:
            RecordLogCorrupt: one was altered or taken out.
            AccessDenied, KeyRevoked: as the key store says.
        """
        expected: int | None = None
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            more = cursor.set_range(_RECORD + _bytes(after + 1))
            while more and (place := bytes(cursor.key())).startswith(_RECORD):
                record = self._opened(transaction, _number(place[1:]), bytes(cursor.value()))
                if expected not in (None, record.first):
                    raise RecordLogCorrupt(
                        f"The push log {self._path} lacks what came before number {record.first}. Restore it."
                    )
                expected = record.last + 1
                yield record
                more = cursor.next()

    def trim(self, upto: int) -> None:
        """Remove records up to a number, and the memory of idempotency keys that are too old."""
        oldest = _AGE + struct.pack(">d", time.time() - REMEMBERED_S)
        with self._env.begin(write=True) as transaction, transaction.cursor() as cursor:
            more = cursor.set_range(_RECORD)
            while more and _RECORD <= bytes(cursor.key()) <= _RECORD + _bytes(upto):
                more = cursor.delete()
            more = cursor.set_range(_AGE)
            while more and (aged := bytes(cursor.key())).startswith(_AGE) and aged < oldest:
                transaction.delete(aged[9:])
                more = cursor.set_range(_AGE) and cursor.delete()

    def close(self) -> None:
        """Unmap the log."""
        self._env.close()

    def _data_key(self) -> tuple[bytes, ValueCipher, bytes]:
        """One of this process alone."""
        if self._writing is None:
            cipher, wrapped = ValueCipher.create(self._keys, push_key(self._view))
            self._writing = (os.urandom(8), cipher, wrapped.encode())
        return self._writing

    def _opened(self, transaction: lmdb.Transaction, first: int, stored: bytes) -> PushRecord:
        rows, name, sealed = msgpack.unpackb(stored)
        if name not in self._ciphers:
            wrapped = bytes(transaction.get(_KEY + name) or b"")
            self._ciphers[name] = ValueCipher.open(self._keys, push_key(self._view), wrapped.decode())
        try:
            content = self._ciphers[name].decrypt(sealed, self._place(first))
        except ArtifactTampered as error:
            raise RecordLogCorrupt(
                f"The push log {self._path} was altered at number {first}. Restore it."
            ) from error
        version, good, bad = msgpack.unpackb(content)
        return PushRecord(
            first=first, rows=rows, view_version=version, good=_from_ipc(good), bad=_from_ipc(bad)
        )

    def _place(self, first: int) -> bytes:
        return place_of(f"push/{self._view}", _bytes(first))


def _again(known: list[Any], digest: bytes) -> Appended:
    first, of_first, answer = known
    if of_first != digest:
        raise InvalidRequest(
            "This idempotency_key was used for another push. Give each push a key of its own, and repeat only the same."
        )
    return Appended(first=first, answer=answer, again=True)


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _from_ipc(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _bytes(number: int) -> bytes:
    return struct.pack(">Q", min(number, _MAX))


def _number(data: bytes | memoryview | None) -> int:
    return 0 if data is None else int(struct.unpack(">Q", data)[0])
