"""The push log of a view: accepted pushes on disk, written before they are answered, in one order for all processes.

It is an LMDB database because an append must do several things in one transaction: look up the idempotency key, assign
the rows' numbers, write the record, store the answer, and reach the disk (an fsync). Readers see whole records in the
order of their numbers, which have no gap. Records are encrypted with their number as AAD. The idempotency key is stored
as a hash. A process that only appends needs only the right to wrap data keys, so a replica cannot read the pushes of
others.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import msgpack
import pyarrow as pa

from cluster.errors import ArtifactTampered, FalajError, InvalidRequest, RecordLogCorrupt
from cluster.security.encryption.envelope import ValueCipher, value_aad
from cluster.security.keys.store import KeyStore
from feature_jobs.store.catalog.protection import push_key

REMEMBERED_S = 7 * 86_400
"""Seconds for which an idempotency key is stored after its push."""
MAP_SIZE_BYTES = 8 << 30
"""Upper bound of a log. The file is sparse, and the stream that stores its records in the table frees their pages."""
_NEXT = b"next"
_RECORD, _KEY, _ANSWER, _AGE = b"r", b"k", b"i", b"t"
_AGE_BYTES = len(_AGE) + 8
_MAX = 2**64 - 1


class PushLogFull(FalajError):
    """The push log has no room."""


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

    name: bytes
    cipher: ValueCipher
    wrapped: bytes


class PushLog:
    """The log of one view. A process may open a folder only once.

    Args:
        folder: `push/<view>`.
        view: name of the view.
        keys: wraps data keys, and unwraps them for reading.
    """

    def __init__(self, folder: Path, view: str, keys: KeyStore) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._view, self._keys, self._path = view, keys, folder
        self._env = lmdb.open(str(folder), map_size=MAP_SIZE_BYTES, mode=0o600, readahead=False)
        self._own_key: _DataKey | None = None
        self._ciphers: dict[bytes, ValueCipher] = {}

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
            KeyNotFound, KeyRevoked, AccessDenied: the key store refuses the key.
        """
        key = self._data_key()
        answer_key = _ANSWER + hashlib.blake2b(idempotency_key.encode(), digest_size=16).digest()
        content = msgpack.packb([record.view_version, _to_ipc(record.good), _to_ipc(record.bad)])
        now = time.time()
        try:
            with self._env.begin(write=True) as transaction:
                if (stored := transaction.get(answer_key)) is not None:
                    return _repeated(msgpack.unpackb(stored), digest)
                first = _number(transaction.get(_NEXT))
                sealed = key.cipher.encrypt(content, self._aad(first))
                transaction.put(_KEY + key.name, key.wrapped)
                transaction.put(_RECORD + _bytes(first), msgpack.packb([record.rows, key.name, sealed]))
                transaction.put(answer_key, msgpack.packb([first, digest, answer]))
                transaction.put(_AGE + struct.pack(">d", now) + answer_key, b"")
                transaction.put(_NEXT, _bytes(first + record.rows))
        except lmdb.MapFullError as error:
            raise PushLogFull(
                f"The push log of view '{self._view}' is full. Run `python -m feature_jobs.stream source=push "
                f"view={self._view}`, which frees it."
            ) from error
        return Appended(first=first, answer=answer, repeated=False)

    def contains(self, first: int) -> bool:
        """Return whether the push with this number is still in the log; a stream removes it when it is in the table."""
        with self._env.begin() as transaction:
            return transaction.get(_RECORD + _bytes(first)) is not None

    def next_number(self) -> int:
        """Return the number of the next row."""
        with self._env.begin() as transaction:
            return _number(transaction.get(_NEXT))

    def records(self, after: int) -> Iterator[PushRecord]:
        """Yield the records after a number, in order.

        Raises:
            RecordLogCorrupt: a record was altered or removed.
            AccessDenied, KeyRevoked: the key store refuses the key.
        """
        expected: int | None = None
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            more = cursor.set_range(_RECORD + _bytes(after + 1))
            while more and (key := bytes(cursor.key())).startswith(_RECORD):
                record = self._decrypted(transaction, _number(key[1:]), bytes(cursor.value()))
                if expected not in (None, record.first):
                    raise RecordLogCorrupt(
                        f"The push log {self._path} lacks the records before number {record.first}. Restore it from a "
                        "backup."
                    )
                expected = record.last + 1
                yield record
                more = cursor.next()

    def trim(self, upto: int) -> None:
        """Remove the records up to a number, and expired idempotency keys."""
        oldest = _AGE + struct.pack(">d", time.time() - REMEMBERED_S)
        with self._env.begin(write=True) as transaction, transaction.cursor() as cursor:
            more = cursor.set_range(_RECORD)
            while more and _RECORD <= bytes(cursor.key()) <= _RECORD + _bytes(upto):
                more = cursor.delete()
            more = cursor.set_range(_AGE)
            while more and (aged := bytes(cursor.key())).startswith(_AGE) and aged < oldest:
                transaction.delete(aged[_AGE_BYTES:])
                more = cursor.set_range(_AGE) and cursor.delete()

    def close(self) -> None:
        """Close the log."""
        self._env.close()

    def _data_key(self) -> _DataKey:
        """Return the data key with which this process, and no other, encrypts."""
        if self._own_key is None:
            cipher, wrapped = ValueCipher.create(self._keys, push_key(self._view))
            self._own_key = _DataKey(os.urandom(8), cipher, wrapped.encode())
        return self._own_key

    def _decrypted(self, transaction: lmdb.Transaction, first: int, stored: bytes) -> PushRecord:
        rows, name, sealed = msgpack.unpackb(stored)
        if name not in self._ciphers:
            wrapped = bytes(transaction.get(_KEY + name) or b"")
            self._ciphers[name] = ValueCipher.open(self._keys, push_key(self._view), wrapped.decode())
        try:
            content = self._ciphers[name].decrypt(sealed, self._aad(first))
        except ArtifactTampered as error:
            raise RecordLogCorrupt(
                f"The push log {self._path} was altered at number {first}. Restore it from a backup."
            ) from error
        version, good, bad = msgpack.unpackb(content)
        return PushRecord(
            first=first, rows=rows, view_version=version, good=_from_ipc(good), bad=_from_ipc(bad)
        )

    def _aad(self, first: int) -> bytes:
        return value_aad(f"push/{self._view}", _bytes(first))


def _repeated(stored: list[Any], digest: bytes) -> Appended:
    first, stored_digest, answer = stored
    if stored_digest != digest:
        raise InvalidRequest(
            "This idempotency_key was used for another push. Use a new key for each push. Repeat a key only with the "
            "same push."
        )
    return Appended(first=first, answer=answer, repeated=True)


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
