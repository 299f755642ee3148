"""The online store's bytes in LMDB: mapped into memory on one machine, so a read is a look-up in this process.

Writers of all processes take turns at one lock. A materialisation therefore writes its rows in pieces under a
generation of their own, and only the switch, which looks at the few rows put since the last one, is a single
transaction.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lmdb

from cluster.errors import OnlineStoreUnavailable
from feature_jobs.store.online_engine import NOTHING, Carry, Write
from feature_jobs.store.online_meta import GENERATION_BYTES, STAMP_BYTES
from feature_jobs.store.online_rows import RANK_BYTES

_META, _PUT = b"\x00meta2\x00", b"\x00put\x00"
PIECE_ROWS = 20_000


class LmdbEngine:
    """An LMDB environment; a folder may be opened once in a process."""

    def __init__(self, folder: Path, *, map_size_bytes: int, readonly: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if readonly and not (folder / "data.mdb").exists():
            lmdb.open(str(folder), map_size=map_size_bytes).close()
        self.env = lmdb.open(
            str(folder), map_size=map_size_bytes, readonly=readonly, max_readers=1024, readahead=False
        )

    def meta(self, view: str) -> bytes | None:
        with self.env.begin() as transaction:
            found: bytes | None = transaction.get(_META + view.encode())
            return found

    def rows(self, view: str, stamp: bytes, addresses: Sequence[bytes]) -> Sequence[bytes | None] | None:
        name = view.encode()
        prefix = name + b"\x00" + stamp[:GENERATION_BYTES]
        with self.env.begin() as transaction:
            get = transaction.get
            meta = get(_META + name)
            if meta is None or not meta.startswith(stamp):
                return None
            return [get(prefix + address) for address in addresses]

    def put(self, view: str, stamp: bytes, writes: Sequence[Write]) -> int | None:
        with self._writing() as transaction:
            if _stamp(transaction, view) != stamp:
                return None
            return _put(transaction, view, stamp[:GENERATION_BYTES], writes)

    def change(self, view: str, before: bytes | None, meta: bytes) -> bool:
        with self._writing() as transaction:
            if _stamp(transaction, view) != before:
                return False
            transaction.put(_META + view.encode(), meta)
            return True

    def stage(self, view: str, generation: bytes, rows: Iterable[tuple[bytes, bytes]]) -> None:
        prefix = view.encode() + b"\x00" + generation
        remaining = iter(rows)
        while piece := list(itertools.islice(remaining, PIECE_ROWS)):
            piece.sort()
            with self._writing() as transaction, transaction.cursor() as cursor:
                cursor.putmulti((prefix + address, packed) for address, packed in piece)

    def switch(self, view: str, before: bytes | None, meta: bytes, carry: Carry) -> bool:
        generation = meta[:GENERATION_BYTES]
        with self._writing() as transaction:
            if _stamp(transaction, view) != before:
                return False
            prefix = view.encode() + b"\x00" + generation
            fresh = [] if before is None else _put_since(transaction, view, before)
            staged: list[bytes | None] = [transaction.get(prefix + address) for address, _ in fresh]  # type: ignore[misc]
            kept = carry([(*row, there) for row, there in zip(fresh, staged, strict=True)])
            _delete(transaction, _PUT + view.encode() + b"\x00")
            _put(transaction, view, generation, [Write(address, packed) for address, packed in kept])
            transaction.put(_META + view.encode(), meta)
        self._remove_others(view, generation)
        return True

    def close(self) -> None:
        self.env.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        try:
            with self.env.begin(write=True) as transaction:
                yield transaction
        except lmdb.MapFullError as error:
            raise OnlineStoreUnavailable(
                f"The online store at {self.env.path()} is full. Raise online.map_size_gib; a materialisation needs "
                "room for a view's rows twice."
            ) from error

    def _remove_others(self, view: str, generation: bytes) -> None:
        """Remove the generations of before, and those of materialisations that were killed, in pieces.

        One that is staged just now cannot be switched to any more, as the generation it began at is gone.
        """
        prefix = view.encode() + b"\x00"
        done = False
        while not done:
            with self._writing() as transaction:
                done = _delete(transaction, prefix, but=prefix + generation, limit=PIECE_ROWS)


def _stamp(transaction: lmdb.Transaction, view: str) -> bytes | None:
    meta = transaction.get(_META + view.encode())
    return None if meta is None else bytes(meta[:STAMP_BYTES])


def _put(transaction: lmdb.Transaction, view: str, generation: bytes, writes: Sequence[Write]) -> int:
    rows, put = view.encode() + b"\x00" + generation, _PUT + view.encode() + b"\x00"
    written = 0
    for write in writes:
        found: bytes | None = transaction.get(rows + write.address)  # type: ignore[assignment]
        rank = NOTHING if found is None else found[:RANK_BYTES]
        fits = rank == write.expected if write.expected else found is None or rank < write.packed[:RANK_BYTES]
        if fits:
            transaction.put(rows + write.address, write.packed)
            transaction.put(put + write.address, b"")
            written += 1
    return written


def _put_since(transaction: lmdb.Transaction, view: str, stamp: bytes) -> list[tuple[bytes, bytes]]:
    """The rows that were put since the last switch."""
    put, rows = _PUT + view.encode() + b"\x00", view.encode() + b"\x00" + stamp[:GENERATION_BYTES]
    addresses = [key[len(put) :] for key in _keys(transaction, put)]
    found = ((address, transaction.get(rows + address)) for address in addresses)
    return [(address, bytes(packed)) for address, packed in found if packed is not None]


def _keys(transaction: lmdb.Transaction, prefix: bytes) -> Iterator[bytes]:
    with transaction.cursor() as cursor:
        more = cursor.set_range(prefix)
        while more and (key := bytes(cursor.key())).startswith(prefix):
            yield key
            more = cursor.next()


def _delete(
    transaction: lmdb.Transaction, prefix: bytes, *, but: bytes | None = None, limit: int | None = None
) -> bool:
    """Delete what begins so, but what begins otherwise; says whether nothing is left of it."""
    deleted = 0
    with transaction.cursor() as cursor:
        more = cursor.set_range(prefix)
        while more and (key := bytes(cursor.key())).startswith(prefix):
            if deleted == limit:
                return False
            if but is not None and key.startswith(but):
                more = cursor.set_range(_after(but))
            else:
                more = cursor.delete()  # and stands at the next one, at nothing behind the last
                deleted += 1
    return True


def _after(prefix: bytes) -> bytes:
    """The first key behind all that begin so."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1])
