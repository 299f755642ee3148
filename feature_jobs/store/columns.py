"""Arrow columns as NumPy arrays.

Through Polars, because Arrow's own `to_numpy` and `fill_null` import pandas, which takes longer than a small join.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import polars as pl
import pyarrow as pa


def numpy_of(column: pa.ChunkedArray | pa.Array, *, null: int | bool = 0) -> npt.NDArray[Any]:
    """The values of a column of numbers or bools.

    Args:
        column: of one of NumPy's own types.
        null: what stands for a null; of the column's kind, so that the type stays.
    """
    return pl.Series(pl.from_arrow(column)).fill_null(null).to_numpy()
