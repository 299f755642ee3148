"""Convert Arrow columns to NumPy arrays, and append or replace columns of Arrow tables.

The conversion to NumPy uses Polars, and imports it when it is called. Arrow's own `to_numpy` and `fill_null` import
pandas, which takes longer than a small join.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import pyarrow as pa


def to_numpy(column: pa.ChunkedArray | pa.Array, *, null: int | bool = 0) -> npt.NDArray[Any]:
    """Return the values of a column of numbers or bools as a NumPy array.

    Args:
        column: A column of a type that NumPy has too.
        null: The value that replaces nulls. It must be of the column's type, so that the type does not change.
    """
    import polars as pl

    return pl.Series(pl.from_arrow(column)).fill_null(null).to_numpy()


def append_columns(table: pa.Table, columns: Mapping[str, pa.ChunkedArray]) -> pa.Table:
    """Return the table with columns appended at the end. Appending one by one would copy the schema each time."""
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    schema = pa.schema([*table.schema, *fields], metadata=table.schema.metadata)
    return pa.Table.from_arrays([*table.columns, *columns.values()], schema=schema)


def replace_columns(table: pa.Table, columns: Mapping[str, pa.ChunkedArray]) -> pa.Table:
    """Return the table with some columns replaced. A column's type may change."""
    schema = pa.schema(
        [
            pa.field(field.name, columns[field.name].type) if field.name in columns else field
            for field in table.schema
        ],
        metadata=table.schema.metadata,
    )
    stored_columns = zip(table.column_names, table.columns, strict=True)
    return pa.Table.from_arrays([columns.get(name, column) for name, column in stored_columns], schema=schema)


def select_or_null(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """Select columns in the given order; a column that an older file lacks is null."""
    present = set(table.column_names)
    if present.issuperset(names):
        return table.select(list(names))
    nulls = pa.nulls(table.num_rows)
    return pa.table([table[name] if name in present else nulls for name in names], names=list(names))
