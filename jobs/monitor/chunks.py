"""How predictions are cut into chunks, and the reference into chunks of a like size.

A figure over a thousand rows wavers more than one over ten thousand, so the reference's own chunks, which thresholds
come from, are made about as large as those that are held against them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from jobs.monitor.config import Period

CHUNK = "_chunk"
MIN_REFERENCE_CHUNKS, MAX_REFERENCE_CHUNKS = 10, 40

_FORMATS = {Period.year: "%Y", Period.month: "%Y-%m", Period.day: "%Y-%m-%d"}


def cut(served: pl.DataFrame, period: Period, *, min_rows: int) -> pl.DataFrame:
    """Predictions in order of time with the name of their chunk; chunks with too few rows are left out.

    Args:
        served: with `as_of`, UTC.
        period: calendar length of a chunk.
        min_rows: of a chunk.
    """
    named = served.sort("as_of", maintain_order=True).with_columns(
        pl.col("as_of").dt.strftime(_FORMATS[period]).alias(CHUNK)
    )
    return named.filter(pl.len().over(CHUNK) >= min_rows)


def reference_chunks(rows: int, *, served_rows: Sequence[int]) -> npt.NDArray[np.int64]:
    """The chunk of each reference row, all of nearly the same size, about that of the served chunks."""
    size = float(np.median(served_rows))
    count = int(np.clip(rows // max(size, 1.0), MIN_REFERENCE_CHUNKS, MAX_REFERENCE_CHUNKS))
    return np.arange(rows, dtype=np.int64) * count // max(rows, 1)
