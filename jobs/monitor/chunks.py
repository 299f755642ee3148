"""Cut served rows into chunks by time, and the reference into chunks of similar size.

A metric over a thousand rows varies more than a metric over ten thousand rows. The thresholds come from the chunks of
the reference. So the chunks of the reference have about as many rows as the served chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from jobs.monitor.config import Period

CHUNK = "_chunk"
"""Column with the name of the chunk that a row belongs to."""
MIN_REFERENCE_CHUNKS, MAX_REFERENCE_CHUNKS = 10, 40

_FORMATS = {Period.year: "%Y", Period.month: "%Y-%m", Period.day: "%Y-%m-%d"}


def assign_chunks(served: pl.DataFrame, period: Period, *, min_rows: int) -> pl.DataFrame:
    """Sort served rows by time, add the name of their chunk, and drop chunks that are too small.

    Args:
        served: Served rows with `as_of` in UTC.
        period: Calendar length of a chunk.
        min_rows: A chunk with fewer rows is dropped.
    """
    rows = served.sort("as_of", maintain_order=True).with_columns(
        pl.col("as_of").dt.strftime(_FORMATS[period]).alias(CHUNK)
    )
    return rows.filter(pl.len().over(CHUNK) >= min_rows)


def reference_chunks(rows: int, *, served_rows: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the chunk number of each reference row.

    The sizes of two chunks differ by at most one row. They are near the median size of the served chunks. The number
    of chunks is between `MIN_REFERENCE_CHUNKS` and `MAX_REFERENCE_CHUNKS`.

    Args:
        rows: Number of reference rows.
        served_rows: Number of rows of each served chunk.
    """
    size = float(np.median(served_rows))
    count = int(np.clip(rows // max(size, 1.0), MIN_REFERENCE_CHUNKS, MAX_REFERENCE_CHUNKS))
    return np.arange(rows, dtype=np.int64) * count // max(rows, 1)
