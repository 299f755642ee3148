"""Read Hive partition folders as columns: a file in `dt=2026-01-31/country=AE/` has `dt` and `country` in every row.

Spark, Hive, Polars and DuckDB write files like this, and leave the columns out of the files. Only columns that a view
declares are read from folders: a join key, a field, a time, or one of the source's `columns`. The folder's text is
parsed as the declared type. A column in the file itself has priority over a folder with its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from urllib.parse import unquote

import pyarrow as pa

from feature_jobs.store.ingestion.declared_types import Roles, typed_text

NULL = "__HIVE_DEFAULT_PARTITION__"
"""The folder's value for null."""


def partitions_of(path: str, wanted: Collection[str]) -> dict[str, str | None]:
    """Return the wanted columns that a file gets from its folders, from the outermost folder to the innermost."""
    pairs = [folder.partition("=") for folder in path.split("/")[:-1]]
    named = {unquote(name): value for name, sign, value in pairs if name and sign}
    return {
        name: None if value == NULL else unquote(value) for name, value in named.items() if name in wanted
    }


def with_partitions(table: pa.Table, path: str, types: Mapping[str, str], roles: Roles) -> pa.Table:
    """Return a file's rows with the columns of its folders added, each of its declared type.

    Raises:
        SchemaMismatch: a folder's value does not fit its column's type.
    """
    for name, value in partitions_of(path, types).items():
        if name not in table.column_names:
            column = pa.chunked_array([pa.repeat(pa.scalar(value, pa.string()), table.num_rows)])
            table = table.append_column(name, typed_text(pa.table({name: column}), types, roles).column(0))
    return table


def with_digest(content: str, path: str, wanted: Collection[str], columns: Collection[str]) -> str:
    """Return a file's digest. It covers the folders if they have columns that the file itself lacks."""
    from_folders = {name: value for name, value in partitions_of(path, wanted).items() if name not in columns}
    if not from_folders:
        return content
    return hashlib.sha256(f"{content}{json.dumps(from_folders)}".encode()).hexdigest()
