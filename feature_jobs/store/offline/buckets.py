"""Which bucket of a feature table an entity lies in.

The function is part of the tables on disk: it must give the same answer in every release, so it is spelled out here
(SplitMix64 for integers, xxHash64 for strings) and not taken from a library that may change its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from feature_jobs.store.types.columns import numpy_of

Hashes = npt.NDArray[np.uint64]
_NULL = np.uint64(0x9AE16A3B2F90404F)


def bucket_of(table: pa.Table, keys: Sequence[str], *, num_buckets: int) -> npt.NDArray[np.int32]:
    """The bucket of every row, 0 to `num_buckets - 1`.

    Args:
        table: has the keys as int64 or string columns.
        keys: the join keys in the view's order.
        num_buckets: fixed when the table was made.
    """
    combined: Hashes = np.zeros(table.num_rows, dtype=np.uint64)
    for key in keys:
        combined = _mix(combined ^ _hash(table[key]))
    return (combined % np.uint64(num_buckets)).astype(np.int32)


def _hash(column: pa.ChunkedArray) -> Hashes:
    hashes = (
        _mix(numpy_of(column).view(np.uint64)) if pa.types.is_int64(column.type) else _hash_strings(column)
    )
    return np.where(numpy_of(column.is_null()), _NULL, hashes)


def _hash_strings(column: pa.ChunkedArray) -> Hashes:
    encoded = pc.fill_null(column, "").combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    words = encoded.dictionary.to_pylist()
    hashes = np.fromiter((xxhash.xxh64_intdigest(word.encode()) for word in words), np.uint64, len(words))
    by_row: Hashes = hashes[numpy_of(encoded.indices)]
    return by_row


def _mix(values: Hashes) -> Hashes:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection that scatters neighbouring numbers."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: Hashes = z ^ (z >> np.uint64(31))
    return mixed
