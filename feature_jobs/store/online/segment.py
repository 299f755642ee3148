"""A materialisation's rows in one file that nobody changes, made so that a batch waits for memory once.

In a tree a row is found by a dozen look-ups in memory that follow from one another. Here the place of every row of a
batch is looked up at once, and all the waits overlap: addresses are evenly distributed, so their first bits say nearly
where in the index a row's place stands.

    address | row | address | row | …                  as they came
    heads | places | buckets                           the index, 64-bit numbers in this machine's order
    rows (8) | bits (8) | widest (8) | index (8) | magic (8)

`heads` are the first eight bytes of each address as a number, in order, and as many greatest numbers behind them as the
widest bucket is wide; `places` is each row's begin and end in the file; `buckets` says where in `heads` the numbers
begin that have the same first bits.
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
from cluster.synced import sync_folder
from feature_jobs.store.online.addresses import ADDRESS_BYTES

MAGIC = b"FALAJROW"
TOGETHER = 8
"""From so many rows on, looking them up at once pays."""
_TAIL = struct.Struct("=QQQQ8s")
_BUCKET_BITS = 2
"""A bucket has 4 to 8 rows on average."""
_LINE_BYTES, _PAGE_BYTES = 64, 4096
_LAST = 2**64 - 1
_Numbers = np.ndarray[Any, np.dtype[np.uint64]]


def write(path: Path, rows: Iterable[tuple[bytes, bytes]]) -> None:
    """Make a segment of rows by address; it is on disk when this returns. Takes about 80 bytes of memory a row.

    Raises:
        OSError: the disk is full, say.
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
    """The rows of one file.

    Raises:
        FileNotFoundError: there is none.
        OnlineStoreUnavailable: it is not whole.
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
                f"{path} was cut off or exchanged. Materialise its view again."
            ) from error
        self._span = np.arange(widest)
        longest = int(np.diff(self._places[:_PAGE_BYTES]).max(initial=0))
        self._lines = np.arange(-ADDRESS_BYTES, min(longest, _PAGE_BYTES), _LINE_BYTES)
        # One number is had from a view of memory in a third of the time that it takes from an array.
        self._head, self._bucket = self._heads.data, self._buckets.data
        self._place = self._places.reshape(-1).data

    def rows(self, addresses: Sequence[bytes]) -> list[bytes | None]:
        """The rows at addresses, none where there is none."""
        if len(addresses) < TOGETHER or not len(self._places):
            return [self._row(address) for address in addresses]
        wanted = np.frombuffer(b"".join(addresses), ">u8")[::2].astype(np.uint64)
        first = self._buckets[wanted >> np.uint64(self._shift)]
        found = first + (self._heads[first[:, None] + self._span] < wanted[:, None]).sum(axis=1)
        places = self._places.take(found, axis=0, mode="clip")
        self._bytes.take(places[:, :1] + self._lines, mode="clip")  # has them all fetched from memory
        file, rows = self._file, []
        for address, (begin, end) in zip(addresses, places.tolist(), strict=True):
            here = file[begin - ADDRESS_BYTES : begin] == address
            rows.append(file[begin:end] if here else self._row(address))
        return rows

    def _row(self, address: bytes) -> bytes | None:
        wanted = int.from_bytes(address[:8], "big")
        bucket = wanted >> self._shift
        at = bisect.bisect_left(self._head, wanted, self._bucket[bucket], self._bucket[bucket + 1])
        while at < len(self._places) and self._head[at] == wanted:
            begin, end = self._place[2 * at], self._place[2 * at + 1]
            if self._file[begin - ADDRESS_BYTES : begin] == address:
                return self._file[begin:end]
            at += 1
        return None
