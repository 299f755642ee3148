"""A segment: the rows of one materialisation in an immutable file, with an index that reads a batch of rows fast.

In a tree, a look-up of a row is about a dozen memory accesses, and each one needs the result of the previous one. Here
the positions of all rows of a batch are looked up at once, so that the waits for memory overlap. This works because
addresses are evenly distributed: the first bits of an address nearly give its position in the index.

    address | row | address | row | …                  in the order of writing
    heads | places | buckets                           the index: 64-bit numbers in this machine's byte order
    rows (8) | bits (8) | widest (8) | index (8) | magic (8)

`heads` are the first eight bytes of each address as a number, ascending. Then the greatest number follows, as often as
the widest bucket has rows. `places` are the begin and the end of each row in the file. `buckets` are the positions in
`heads` at which the numbers with the same first bits begin.
"""

from __future__ import annotations

import bisect
import mmap
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cluster.errors import OnlineStoreUnavailable
from cluster.host.fsync import sync_folder
from feature_jobs.store.online.addresses import ADDRESS_BYTES

MAGIC = b"FALAJROW"
BATCH_ROWS = 8
"""From this number of rows on, one look-up of all rows is faster than one by one."""
_TAIL = struct.Struct("=QQQQ8s")
_BUCKET_BITS = 2
"""A bucket has 4 to 8 rows on average."""
_LINE_BYTES, _PAGE_BYTES = 64, 4096
_LAST = 2**64 - 1
_Numbers = np.ndarray[Any, np.dtype[np.uint64]]


def write(path: Path, rows: Iterable[tuple[bytes, bytes]]) -> None:
    """Write a segment from addresses and rows, and sync it to disk. This needs about 80 bytes of memory per row.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    heads, places = bytearray(), array("Q")
    with path.open("wb", buffering=1 << 20) as file:
        end = 0
        for address, packed in rows:
            file.write(address + packed)
            heads += address[:8]
            places.append(end + ADDRESS_BYTES)
            end += ADDRESS_BYTES + len(packed)
            places.append(end)
        index = -(-end // 8) * 8
        file.write(bytes(index - end))
        _write_index(file, np.frombuffer(heads, ">u8").astype(np.uint64), places, index)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _write_index(file: BinaryIO, heads: _Numbers, places: array[int], index: int) -> None:
    order = np.argsort(heads, kind="stable")
    heads = heads[order]
    bits = max(len(heads).bit_length() - 1 - _BUCKET_BITS, 1)
    firsts = np.arange(2**bits, dtype=np.uint64) << np.uint64(64 - bits)
    buckets = np.append(np.searchsorted(heads, firsts), len(heads)).astype(np.uint64)
    widest = int(np.diff(buckets).max())
    file.write(np.append(heads, np.full(widest, _LAST, np.uint64)).data)
    file.write(np.frombuffer(places, np.uint64).reshape(-1, 2)[order].reshape(-1).data)
    file.write(buckets.data)
    file.write(_TAIL.pack(len(heads), bits, widest, index, MAGIC))


class Segment:
    """Reads the rows of one file.

    Raises:
        FileNotFoundError: the file does not exist.
        OnlineStoreUnavailable: the file is not complete.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._file = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if size else b""
        if isinstance(self._file, mmap.mmap):
            self._file.madvise(mmap.MADV_RANDOM)
        try:
            rows, bits, widest, index, magic = _TAIL.unpack_from(self._file, size - _TAIL.size)
            self._shift, self._bytes = 64 - bits, np.frombuffer(self._file, np.uint8)
            self._heads = np.frombuffer(self._file, np.uint64, rows + widest, index)
            index += self._heads.nbytes
            self._places = np.frombuffer(self._file, np.int64, 2 * rows, index).reshape(-1, 2)
            index += self._places.nbytes
            self._buckets = np.frombuffer(self._file, np.int64, 2**bits + 1, index)
            if magic != MAGIC or index + self._buckets.nbytes + _TAIL.size != size:
                raise ValueError("not a segment")
        except (ValueError, OverflowError, struct.error) as error:
            raise OnlineStoreUnavailable(
                f"{path} was cut off or replaced. Materialise its view again."
            ) from error
        self._span = np.arange(widest)
        longest = int(np.diff(self._places[:_PAGE_BYTES]).max(initial=0))
        self._lines = np.arange(-ADDRESS_BYTES, min(longest, _PAGE_BYTES), _LINE_BYTES)
        # Reading one number from a memory view takes a third of the time of reading it from an array.
        self._head, self._bucket = self._heads.data, self._buckets.data
        self._place = self._places.reshape(-1).data

    def rows(self, addresses: Sequence[bytes]) -> list[bytes | None]:
        """Return the rows at addresses, None for each missing one."""
        if len(addresses) < BATCH_ROWS or not len(self._places):
            return [self._row(address) for address in addresses]
        heads = np.frombuffer(b"".join(addresses), ">u8")[::2].astype(np.uint64)
        first = self._buckets[heads >> np.uint64(self._shift)]
        positions = first + (self._heads[first[:, None] + self._span] < heads[:, None]).sum(axis=1)
        places = self._places.take(positions, axis=0, mode="clip")
        self._bytes.take(places[:, :1] + self._lines, mode="clip")  # fetches all rows from memory at once
        file, rows = self._file, []
        for address, (begin, end) in zip(addresses, places.tolist(), strict=True):
            is_here = file[begin - ADDRESS_BYTES : begin] == address
            rows.append(file[begin:end] if is_here else self._row(address))
        return rows

    def _row(self, address: bytes) -> bytes | None:
        head = int.from_bytes(address[:8], "big")
        bucket = head >> self._shift
        position = bisect.bisect_left(self._head, head, self._bucket[bucket], self._bucket[bucket + 1])
        while position < len(self._places) and self._head[position] == head:
            begin, end = self._place[2 * position], self._place[2 * position + 1]
            if self._file[begin - ADDRESS_BYTES : begin] == address:
                return self._file[begin:end]
            position += 1
        return None
