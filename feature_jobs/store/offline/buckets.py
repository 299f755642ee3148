"""Assign the entities of a feature table to buckets.

The hash is part of the format of tables on disk, so every release must compute the same hash. It is therefore
implemented here (SplitMix64 for integers, xxHash64 for strings). A library could change its own hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from feature_jobs.store.types.columns import to_numpy
from feature_jobs.store.types.schema import BUCKET

Hashes = npt.NDArray[np.uint64]
BUCKET_VALUES = 16_000_000
"""Largest number of values (rows times columns) for which a bucket is made, about 128 MiB. The commands that work
bucket by bucket need a few times this memory."""
MIN_BUCKETS, MAX_CHOSEN_BUCKETS = 8, 4096
_NULL = np.uint64(0x9AE16A3B2F90404F)


def bucket_of(table: pa.Table, keys: Sequence[str], *, num_buckets: int) -> npt.NDArray[np.int32]:
    """Return the bucket of every row, from 0 to `num_buckets - 1`.

    Args:
        table: rows with the join keys as int64 or string columns.
        keys: join keys in the view's order.
        num_buckets: the table's number of buckets.
    """
    combined: Hashes = np.zeros(table.num_rows, dtype=np.uint64)
    for key in keys:
        combined = _mix(combined ^ _hash(table[key]))
    return (combined % np.uint64(num_buckets)).astype(np.int32)


def buckets_for(values: int) -> int:
    """Return the number of buckets for a table of this many values. It is a power of two."""
    needed = -(-values // BUCKET_VALUES)
    return min(max(1 << max(needed - 1, 0).bit_length(), MIN_BUCKETS), MAX_CHOSEN_BUCKETS)


def split_by_bucket(
    rows: pa.Table, keys: Sequence[str], *, num_buckets: int
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Yield each bucket that has rows, and its rows in their order. For the arguments see `bucket_of`."""
    numbers = pl.Series(BUCKET, bucket_of(rows, keys, num_buckets=num_buckets))
    frame = pl.DataFrame(pl.from_arrow(rows)).with_columns(numbers)
    for part in frame.partition_by(BUCKET, maintain_order=True):
        yield int(part[BUCKET][0]), part.drop(BUCKET)


def _hash(column: pa.ChunkedArray) -> Hashes:
    hashes = (
        _mix(to_numpy(column).view(np.uint64)) if pa.types.is_int64(column.type) else _hash_strings(column)
    )
    return np.where(to_numpy(column.is_null()), _NULL, hashes)


def _hash_strings(column: pa.ChunkedArray) -> Hashes:
    encoded = pc.fill_null(column, "").combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    texts = encoded.dictionary.to_pylist()
    hashes = np.fromiter((xxhash.xxh64_intdigest(text.encode()) for text in texts), np.uint64, len(texts))
    by_row: Hashes = hashes[to_numpy(encoded.indices)]
    return by_row


def _mix(values: Hashes) -> Hashes:
    """Apply SplitMix64's finaliser (Steele, Lea and Flood 2014), a bijection that scatters neighbouring numbers."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: Hashes = z ^ (z >> np.uint64(31))
    return mixed
