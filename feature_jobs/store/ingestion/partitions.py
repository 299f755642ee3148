"""Hive partition folders as columns: a file in `dt=2026-01-31/country=AE/` has `dt` and `country` in every row.

Spark, Hive, Polars and DuckDB write them so, and leave the columns out of the files. Taken are those that a view
declares: a join key, a field, a time, or one of the source's `columns`. Their values are text, read as declared. A
column that the file has itself counts before a folder of its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from urllib.parse import unquote

import pyarrow as pa

from feature_jobs.store.ingestion.typed import Roles, typed_text

NULL = "__HIVE_DEFAULT_PARTITION__"
"""The folder's value where the column is null."""


def partitions_of(path: str, wanted: Collection[str]) -> dict[str, str | None]:
    """The columns, of those wanted, that a file's folders give it, from the outermost inwards."""
    pairs = [folder.partition("=") for folder in path.split("/")[:-1]]
    named = {unquote(name): value for name, sign, value in pairs if name and sign}
    return {
        name: None if value == NULL else unquote(value) for name, value in named.items() if name in wanted
    }


def with_partitions(table: pa.Table, path: str, types: Mapping[str, str], roles: Roles) -> pa.Table:
    """Rows of a file with the columns of its folders, each of its declared type.

    Raises:
        SchemaMismatch: a folder's value is none of its type.
    """
    for name, value in partitions_of(path, types).items():
        if name not in table.column_names:
            column = pa.chunked_array([pa.repeat(pa.scalar(value, pa.string()), table.num_rows)])
            table = table.append_column(name, typed_text(pa.table({name: column}), types, roles).column(0))
    return table


def with_digest(content: str, path: str, wanted: Collection[str], columns: Collection[str]) -> str:
    """A file's digest, which its folders are part of where they give it columns that it has not itself."""
    given = {name: value for name, value in partitions_of(path, wanted).items() if name not in columns}
    return hashlib.sha256(f"{content}{json.dumps(given)}".encode()).hexdigest() if given else content
