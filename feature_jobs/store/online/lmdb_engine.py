"""The online store's bytes in LMDB: mapped into memory on one machine, so a read is a look-up in this process.

Writers of all processes take turns at one lock. A materialisation therefore writes its rows into a file of its own
(`online_segment.py`), and only the switch, which looks at the few rows put since the last one, is a transaction. What
is put afterwards lies in LMDB, under the generation, and goes before what the file says.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import lmdb

from cluster.errors import OnlineStoreUnavailable
from feature_jobs.store.online import segment as online_segment
from feature_jobs.store.online.engine import NOTHING, Carry, Write
from feature_jobs.store.online.meta import GENERATION_BYTES, STAMP_BYTES
from feature_jobs.store.online.rows import RANK_BYTES
from feature_jobs.store.online.segment import Segment

_META, _PUT, _BASE = b"\x00meta2\x00", b"\x00put\x00", b"\x00base\x00"
PIECE_ROWS = 20_000
DATA_FILE = "data.mdb"
LOOK_AGAIN_S = 1.0
"""How long a reader may go on with a file that was deleted and made anew."""

_Seen: TypeAlias = tuple[bytes, int, Segment | None, bool]
"""The stamp, the transaction as of which nothing has changed, the file if the generation began with one, and whether
anything was put since."""


class LmdbEngine:
    """An LMDB environment; a folder may be opened once in a process."""

    def __init__(self, folder: Path, *, map_size_bytes: int, readonly: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._map_size_bytes, self._readonly = folder, map_size_bytes, readonly
        if readonly and self._identity() is None:
            lmdb.open(str(folder), map_size=map_size_bytes).close()
        self._reopening = threading.Lock()
        self._open()

    def meta(self, view: str) -> bytes | None:
        self._follow_file()
        with self.env.begin() as transaction:
            found: bytes | None = transaction.get(_META + view.encode())
            return found

    def rows(self, view: str, stamp: bytes, addresses: Sequence[bytes]) -> Sequence[bytes | None] | None:
        if time.monotonic() >= self._look_again_at:
            self._follow_file()
        with self.env.begin() as transaction:
            seen = self._seen.get(view)
            if seen is None or seen[0] != stamp or seen[1] != transaction.id():
                seen = self._look(transaction, view, stamp)
                if seen is None:
                    return None
            _, _, base, touched = seen
            if base is not None and not touched:
                return base.rows(addresses)
            prefix, get = view.encode() + b"\x00" + stamp[:GENERATION_BYTES], transaction.get
            found = [get(prefix + address) for address in addresses]
        return found if base is None else _over(base, addresses, found)

    def put(self, view: str, stamp: bytes, writes: Sequence[Write]) -> int | None:
        with self._writing() as transaction:
            if _stamp(transaction, view) != stamp:
                return None
            generation = stamp[:GENERATION_BYTES]
            return _put(transaction, view, generation, writes, self._base(transaction, view, generation))

    def change(self, view: str, before: bytes | None, meta: bytes) -> bool:
        with self._writing() as transaction:
            if _stamp(transaction, view) != before:
                return False
            transaction.put(_META + view.encode(), meta)
            return True

    def stage(self, view: str, generation: bytes, rows: Iterable[tuple[bytes, bytes]]) -> None:
        path = self._path(view, generation)
        try:
            online_segment.write(path, rows)
        except BaseException as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OnlineStoreUnavailable(f"{path} cannot be written: {error}.") from error
            raise

    def switch(self, view: str, before: bytes | None, meta: bytes, carry: Carry) -> bool:
        generation = meta[:GENERATION_BYTES]
        with self._writing() as transaction:
            if _stamp(transaction, view) != before:
                return False
            base = Segment(self._path(view, generation))
            # A materialisation whose file is here by now began before this one switches, so that it cannot any more.
            others = [
                path for path in self._folder.glob(f"{view}.*.rows") if path != self._path(view, generation)
            ]
            fresh = [] if before is None else _put_since(transaction, view, before)
            staged = base.rows([address for address, _ in fresh])
            kept = carry([(*row, there) for row, there in zip(fresh, staged, strict=True)])
            _delete(transaction, _put_key(view))
            writes = [Write(address, packed) for address, packed in kept]
            _put(transaction, view, generation, writes, base)
            transaction.put(_META + view.encode(), meta)
            transaction.put(_BASE + view.encode(), generation)
        for path in others:
            path.unlink(missing_ok=True)
        self._remove_others(view)
        return True

    def close(self) -> None:
        self.env.close()

    def _open(self) -> None:
        self._bases: dict[str, tuple[bytes, Segment | None]] = {}
        self._seen: dict[str, _Seen] = {}
        self.env = lmdb.open(
            str(self._folder),
            map_size=self._map_size_bytes,
            readonly=self._readonly,
            max_readers=1024,
            readahead=False,
        )
        self._opened = self._identity()
        self._look_again_at = time.monotonic() + LOOK_AGAIN_S

    def _identity(self) -> tuple[int, int] | None:
        """Which file lies in the folder now; None where none does."""
        try:
            found = (self._folder / DATA_FILE).stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _follow_file(self) -> bool:
        """Open the folder's file again if it is another one than is open: it was deleted, and a materialisation made
        it anew. Says whether there is a file; without one, reads go on with the open one, which is as it was."""
        with self._reopening:
            found = self._identity()
            if found is not None and found != self._opened:
                self._open()  # transactions that run keep the environment of before until they end
            self._look_again_at = time.monotonic() + LOOK_AGAIN_S
            return found is not None

    def _path(self, view: str, generation: bytes) -> Path:
        return self._folder / f"{view}.{generation.hex()}.rows"

    def _base(self, transaction: lmdb.Transaction, view: str, generation: bytes) -> Segment | None:
        """What the generation began with; none for one that began with a put.

        Raises:
            FileNotFoundError: another generation is there by now, which took the file of before away.
        """
        known = self._bases.get(view)
        if known is not None and known[0] == generation:
            return known[1]
        path, base = self._path(view, generation), None
        if transaction.get(_BASE + view.encode()) == generation:
            try:
                base = Segment(path)
            except FileNotFoundError as error:
                if not (self.meta(view) or b"").startswith(generation):
                    raise
                again = f"Run `python -m feature_jobs.materialize view={view}`."
                raise OnlineStoreUnavailable(f"{path} was there and is not. {again}") from error
        self._bases[view] = generation, base
        return base

    def _look(self, transaction: lmdb.Transaction, view: str, stamp: bytes) -> _Seen | None:
        """Where a view's rows lie as of this transaction; none when the stamp has changed."""
        if _stamp(transaction, view) != stamp:
            return None
        try:
            base = self._base(transaction, view, stamp[:GENERATION_BYTES])
        except FileNotFoundError:
            return None
        touched = any(_keys(transaction, _put_key(view)))
        seen = self._seen[view] = stamp, transaction.id(), base, touched
        return seen

    @contextlib.contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        if not self._follow_file():
            raise OnlineStoreUnavailable(
                f"{self._folder / DATA_FILE} was there and is not: what is put would be lost. Run "
                "`python -m feature_jobs.stream source=push view=… once=true` for each view with pushes, then "
                "`python -m feature_jobs.materialize view=all`."
            )
        try:
            with self.env.begin(write=True) as transaction:
                yield transaction
        except lmdb.MapFullError as error:
            raise OnlineStoreUnavailable(
                f"The online store at {self.env.path()} is full. Raise online.map_size_gib, which bounds the rows that "
                "were put since each view was materialised, or materialise."
            ) from error

    def _remove_others(self, view: str) -> None:
        """Remove what was put into the generations of before, in pieces."""
        prefix = view.encode() + b"\x00"
        done = False
        while not done:
            with self._writing() as transaction:
                # Another materialisation may have switched since.
                generation = (_stamp(transaction, view) or b"")[:GENERATION_BYTES]
                done = _delete(transaction, prefix, but=prefix + generation, limit=PIECE_ROWS)


def _over(base: Segment, addresses: Sequence[bytes], found: Sequence[bytes | None]) -> Sequence[bytes | None]:
    """The rows that were put, and beneath them those of before."""
    if not any(found):
        return base.rows(addresses)
    lacking = [address for address, row in zip(addresses, found, strict=True) if row is None]
    beneath = iter(base.rows(lacking))
    return [next(beneath) if row is None else row for row in found]


def _put_key(view: str) -> bytes:
    """What the marks of a view's put rows begin with."""
    return _PUT + view.encode() + b"\x00"


def _stamp(transaction: lmdb.Transaction, view: str) -> bytes | None:
    meta = transaction.get(_META + view.encode())
    return None if meta is None else bytes(meta[:STAMP_BYTES])


def _put(
    transaction: lmdb.Transaction, view: str, generation: bytes, writes: Sequence[Write], base: Segment | None
) -> int:
    rows, put = view.encode() + b"\x00" + generation, _put_key(view)
    written = 0
    staged = [None] * len(writes) if base is None else base.rows([write.address for write in writes])
    for write, beneath in zip(writes, staged, strict=True):
        found: bytes | None = transaction.get(rows + write.address) or beneath  # type: ignore[assignment]
        rank = NOTHING if found is None else found[:RANK_BYTES]
        fits = rank == write.expected if write.expected else found is None or rank < write.packed[:RANK_BYTES]
        if fits:
            transaction.put(rows + write.address, write.packed)
            transaction.put(put + write.address, b"")
            written += 1
    return written


def _put_since(transaction: lmdb.Transaction, view: str, stamp: bytes) -> list[tuple[bytes, bytes]]:
    """The rows that were put since the last switch."""
    put, rows = _put_key(view), view.encode() + b"\x00" + stamp[:GENERATION_BYTES]
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
