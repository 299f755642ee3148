"""Arrow columns as NumPy arrays, and tables with other columns.

To NumPy through Polars, because Arrow's own `to_numpy` and `fill_null` import pandas, which takes longer than a small
join.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def with_appended(table: pa.Table, columns: Mapping[str, pa.ChunkedArray]) -> pa.Table:
    """The table with more columns at its end. Appended one by one, each would copy the whole schema."""
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    schema = pa.schema([*table.schema, *fields], metadata=table.schema.metadata)
    return pa.Table.from_arrays([*table.columns, *columns.values()], schema=schema)


def with_replaced(table: pa.Table, columns: Mapping[str, pa.ChunkedArray]) -> pa.Table:
    """The table with other values in some of its columns; a column's type may change."""
    schema = pa.schema(
        [pa.field(one.name, columns[one.name].type) if one.name in columns else one for one in table.schema],
        metadata=table.schema.metadata,
    )
    kept = zip(table.column_names, table.columns, strict=True)
    return pa.Table.from_arrays([columns.get(name, column) for name, column in kept], schema=schema)
