"""Hive partition folders as columns: a file in `dt=2026-01-31/country=AE/` has `dt` and `country` in every row.

Spark, Hive, Polars and DuckDB write them so, and leave the columns out of the files. The values are text, read as the
view declares them. A column that the file has itself counts before a folder of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote

import pyarrow as pa

from feature_jobs.store.typed import typed_text

NULL = "__HIVE_DEFAULT_PARTITION__"
"""The folder's value where the column is null."""


def partitions_of(path: str) -> dict[str, str | None]:
    """The columns that a file's folders give it, from the outermost inwards."""
    pairs = [folder.partition("=") for folder in path.split("/")[:-1]]
    return {
        unquote(name): None if value == NULL else unquote(value)
        for name, sign, value in pairs
        if name and sign
    }


def with_partitions(table: pa.Table, path: str, types: Mapping[str, str] | None = None) -> pa.Table:
    """Rows of a file with the columns of its folders, as text or, where given, as their types.

    Raises:
        SchemaMismatch: a folder's value is none of its type.
    """
    for name, value in partitions_of(path).items():
        if name not in table.column_names:
            column = pa.chunked_array([pa.repeat(pa.scalar(value, pa.string()), table.num_rows)])
            typed = typed_text(pa.table({name: column}), types or {})
            table = table.append_column(name, typed.column(0))
    return table
