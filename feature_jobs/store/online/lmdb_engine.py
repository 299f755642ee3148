"""The LMDB engine of the online store: mapped into memory on one machine, so a read is a look-up in this process.

Writers of all processes share one lock. A materialisation therefore writes its rows to a file of its own
(`segment.py`), the base of its generation. Only the switch to this generation is a transaction, for the few rows that
were put since the last switch. Later puts are written to LMDB under the generation's id, and take precedence over the
file.
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
from feature_jobs.store.online.engine import NOTHING, Carry, RecentRow, Write
from feature_jobs.store.online.meta import GENERATION_BYTES, STAMP_BYTES
from feature_jobs.store.online.rows import RANK_BYTES
from feature_jobs.store.online.segment import Segment

_META, _PUT, _BASE = b"\x00meta2\x00", b"\x00put\x00", b"\x00base\x00"
PIECE_ROWS = 20_000
"""Number of old rows that one transaction deletes."""
DATA_FILE = "data.mdb"
CHECK_FILE_S = 1.0
"""Longest time in seconds for which a reader uses a database file that was deleted and created again."""

_Cached: TypeAlias = tuple[bytes, int, Segment | None, bool]
"""The stamp of a view, the id of the last transaction, the base segment (None if the generation began with a put), and
whether rows were put since. It is valid until the next transaction. A plain tuple, because each read uses it."""


class LmdbEngine:
    """An engine on an LMDB environment. A process may open a folder only once."""

    def __init__(self, folder: Path, *, map_size_bytes: int, readonly: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._map_size_bytes, self._readonly = folder, map_size_bytes, readonly
        if readonly and self._identity() is None:
            lmdb.open(str(folder), map_size=map_size_bytes).close()
        self._reopening = threading.Lock()
        self._open()

    def meta(self, view: str) -> bytes | None:
        self._reopen_if_replaced()
        with self.env.begin() as transaction:
            packed: bytes | None = transaction.get(_META + view.encode())
            return packed

    def rows(self, view: str, stamp: bytes, addresses: Sequence[bytes]) -> Sequence[bytes | None] | None:
        if time.monotonic() >= self._check_file_at:
            self._reopen_if_replaced()
        with self.env.begin() as transaction:
            cached = self._cache.get(view)
            if cached is None or cached[0] != stamp or cached[1] != transaction.id():
                cached = self._look_up(transaction, view, stamp)
                if cached is None:
                    return None
            _, _, base, has_puts = cached
            if base is not None and not has_puts:
                return base.rows(addresses)
            prefix, get = view.encode() + b"\x00" + stamp[:GENERATION_BYTES], transaction.get
            put_rows = [get(prefix + address) for address in addresses]
        return put_rows if base is None else _with_base(base, addresses, put_rows)

    def put(self, view: str, stamp: bytes, writes: Sequence[Write]) -> int | None:
        with self._writing() as transaction:
            if _stamp(transaction, view) != stamp:
                return None
            generation = stamp[:GENERATION_BYTES]
            return _put(transaction, view, generation, writes, self._base(transaction, view, generation))

    def set_meta(self, view: str, expected: bytes | None, meta: bytes) -> bool:
        with self._writing() as transaction:
            if _stamp(transaction, view) != expected:
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

    def switch(self, view: str, expected: bytes | None, meta: bytes, carry: Carry) -> bool:
        generation = meta[:GENERATION_BYTES]
        path = self._path(view, generation)
        with self._writing() as transaction:
            if _stamp(transaction, view) != expected:
                return False
            base = Segment(path)
            # Every other materialisation whose file exists now has begun before this switch, so it will fail.
            others = [other for other in self._folder.glob(f"{view}.*.rows") if other != path]
            recent = [] if expected is None else _put_since(transaction, view, expected)
            staged = base.rows([address for address, _ in recent])
            carried = carry([RecentRow(*row, other) for row, other in zip(recent, staged, strict=True)])
            _delete(transaction, _put_key(view))
            writes = [Write(address, packed) for address, packed in carried]
            _put(transaction, view, generation, writes, base)
            transaction.put(_META + view.encode(), meta)
            transaction.put(_BASE + view.encode(), generation)
        for other in others:
            other.unlink(missing_ok=True)
        self._remove_others(view)
        return True

    def close(self) -> None:
        self.env.close()

    def _open(self) -> None:
        self._bases: dict[str, tuple[bytes, Segment | None]] = {}
        self._cache: dict[str, _Cached] = {}
        self.env = lmdb.open(
            str(self._folder),
            map_size=self._map_size_bytes,
            readonly=self._readonly,
            max_readers=1024,
            readahead=False,
        )
        self._opened = self._identity()
        self._check_file_at = time.monotonic() + CHECK_FILE_S

    def _identity(self) -> tuple[int, int] | None:
        """Return device and inode of the database file; None if it does not exist."""
        try:
            status = (self._folder / DATA_FILE).stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _reopen_if_replaced(self) -> bool:
        """Open the database file again if it was deleted and a materialisation created a new one.

        Returns:
            Whether a file exists. If not, reads continue with the open one, which does not change.
        """
        with self._reopening:
            identity = self._identity()
            if identity is not None and identity != self._opened:
                self._open()  # running transactions keep the old environment until they end
            self._check_file_at = time.monotonic() + CHECK_FILE_S
            return identity is not None

    def _path(self, view: str, generation: bytes) -> Path:
        return self._folder / f"{view}.{generation.hex()}.rows"

    def _base(self, transaction: lmdb.Transaction, view: str, generation: bytes) -> Segment | None:
        """Return the base segment of a generation; None if it began with a put.

        Raises:
            FileNotFoundError: the view has another generation by now, and the file was deleted.
            OnlineStoreUnavailable: the file of the current generation is missing.
        """
        cached = self._bases.get(view)
        if cached is not None and cached[0] == generation:
            return cached[1]
        path, base = self._path(view, generation), None
        if transaction.get(_BASE + view.encode()) == generation:
            try:
                base = Segment(path)
            except FileNotFoundError as error:
                if not (self.meta(view) or b"").startswith(generation):
                    raise
                command = f"python -m feature_jobs.materialize view={view}"
                raise OnlineStoreUnavailable(f"{path} was deleted. Run `{command}`.") from error
        self._bases[view] = generation, base
        return base

    def _look_up(self, transaction: lmdb.Transaction, view: str, stamp: bytes) -> _Cached | None:
        """Look up where a view's rows are, and cache it; None if the stamp has changed."""
        if _stamp(transaction, view) != stamp:
            return None
        try:
            base = self._base(transaction, view, stamp[:GENERATION_BYTES])
        except FileNotFoundError:
            return None
        has_puts = any(_keys(transaction, _put_key(view)))
        cached = self._cache[view] = stamp, transaction.id(), base, has_puts
        return cached

    @contextlib.contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        """Run a write transaction.

        Raises:
            OnlineStoreUnavailable: the database file was deleted, or it is full.
        """
        if not self._reopen_if_replaced():
            raise OnlineStoreUnavailable(
                f"{self._folder / DATA_FILE} was deleted, so new rows would be lost. Run "
                "`python -m feature_jobs.stream source=push view=… once=true` for each view with pushes, then "
                "`python -m feature_jobs.materialize view=all`."
            )
        try:
            with self.env.begin(write=True) as transaction:
                yield transaction
        except lmdb.MapFullError as error:
            raise OnlineStoreUnavailable(
                f"The online store at {self.env.path()} is full. Raise online.map_size_gib, which bounds the rows that "
                "were put since the last materialisation of each view, or materialise the views."
            ) from error

    def _remove_others(self, view: str) -> None:
        """Delete the rows that were put into previous generations, in several transactions."""
        prefix = view.encode() + b"\x00"
        done = False
        while not done:
            with self._writing() as transaction:
                # Another materialisation may have switched in the meantime, so read the generation again.
                generation = (_stamp(transaction, view) or b"")[:GENERATION_BYTES]
                done = _delete(transaction, prefix, except_prefix=prefix + generation, limit=PIECE_ROWS)


def _with_base(
    base: Segment, addresses: Sequence[bytes], put_rows: Sequence[bytes | None]
) -> Sequence[bytes | None]:
    """Return the rows that were put, and for each missing one the base segment's row."""
    if not any(put_rows):
        return base.rows(addresses)
    missing = [address for address, row in zip(addresses, put_rows, strict=True) if row is None]
    base_rows = iter(base.rows(missing))
    return [next(base_rows) if row is None else row for row in put_rows]


def _put_key(view: str) -> bytes:
    """Return the prefix of marker keys. A view has one marker for each row that was put."""
    return _PUT + view.encode() + b"\x00"


def _stamp(transaction: lmdb.Transaction, view: str) -> bytes | None:
    meta = transaction.get(_META + view.encode())
    return None if meta is None else bytes(meta[:STAMP_BYTES])


def _put(
    transaction: lmdb.Transaction, view: str, generation: bytes, writes: Sequence[Write], base: Segment | None
) -> int:
    """Write each row whose stored rank is the expected one or, without one, is smaller. Return their number."""
    prefix, marker = view.encode() + b"\x00" + generation, _put_key(view)
    written = 0
    base_rows = [None] * len(writes) if base is None else base.rows([write.address for write in writes])
    for write, base_row in zip(writes, base_rows, strict=True):
        stored: bytes | None = transaction.get(prefix + write.address) or base_row  # type: ignore[assignment]
        rank = NOTHING if stored is None else stored[:RANK_BYTES]
        is_newer = stored is None or rank < write.packed[:RANK_BYTES]
        if (rank == write.expected) if write.expected else is_newer:
            transaction.put(prefix + write.address, write.packed)
            transaction.put(marker + write.address, b"")
            written += 1
    return written


def _put_since(transaction: lmdb.Transaction, view: str, stamp: bytes) -> list[tuple[bytes, bytes]]:
    """Return address and row of the rows that were put since the last switch."""
    marker, prefix = _put_key(view), view.encode() + b"\x00" + stamp[:GENERATION_BYTES]
    addresses = [key[len(marker) :] for key in _keys(transaction, marker)]
    rows = ((address, transaction.get(prefix + address)) for address in addresses)
    return [(address, bytes(packed)) for address, packed in rows if packed is not None]


def _keys(transaction: lmdb.Transaction, prefix: bytes) -> Iterator[bytes]:
    with transaction.cursor() as cursor:
        more = cursor.set_range(prefix)
        while more and (key := bytes(cursor.key())).startswith(prefix):
            yield key
            more = cursor.next()


def _delete(
    transaction: lmdb.Transaction,
    prefix: bytes,
    *,
    except_prefix: bytes | None = None,
    limit: int | None = None,
) -> bool:
    """Delete keys with a prefix, but not those with `except_prefix`; return whether all of them are deleted."""
    deleted = 0
    with transaction.cursor() as cursor:
        more = cursor.set_range(prefix)
        while more and (key := bytes(cursor.key())).startswith(prefix):
            if deleted == limit:
                return False
            if except_prefix is not None and key.startswith(except_prefix):
                more = cursor.set_range(_after(except_prefix))
            else:
                more = cursor.delete()  # moves the cursor to the next key
                deleted += 1
    return True


def _after(prefix: bytes) -> bytes:
    """Return the first key after all keys with a prefix."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1])
