"""Move pushed rows to quarantine if their types do not fit the feature table.

A push is checked when it arrives. After that, the table may get columns of other types: from a batch of files with keys
of another type, or from a changed definition. Rows that do not fit must not block later rows, so they go to quarantine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa

from feature_jobs.store.ingestion.pushed_rows import POSITION
from feature_jobs.store.ingestion.validation import json_form
from feature_jobs.store.streaming.push_log import PushRecord
from feature_jobs.store.types.casting import same_type
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT


class SourceNames(NamedTuple):
    """The column names of a view's source."""

    event: str
    created: str
    deleted: str
    has_transform: bool
    """Whether the view has a transform. Without one, a stored row is a row of the source."""


def source_names(definition: Mapping[str, Any]) -> SourceNames:
    """Return the names from a view's definition in the ledger."""
    source = definition["source"]
    return SourceNames(
        event=source["event_timestamp"],
        created=source.get("created_timestamp") or CREATED,
        deleted=source.get("deleted") or DELETED,
        has_transform=definition.get("transform") is not None,
    )


def move_incompatible(
    records: Iterable[PushRecord],
    stored: pa.Schema | None,
    declared: Mapping[str, pa.DataType],
    names: Callable[[str], SourceNames],
) -> list[PushRecord]:
    """Move incompatible rows from the good to the bad rows of their records, and return the records.

    Without a table, the first record with good rows decides the columns' types, except those of declared keys.

    Args:
        records: records in the order of the log.
        stored: the table's columns; None before its first row.
        declared: declared types of join keys.
        names: returns the source's column names for a version of the view.
    """
    types = {column.name: column.type for column in stored or ()}
    types = {**declared, **types}
    compatible = []
    for record in records:
        reason = _reason(record.good.schema, types)
        if reason is not None:
            record = _with_all_bad(record, types, reason, names)
        elif record.good.num_rows and stored is None:
            types = {column.name: column.type for column in record.good.schema} | types
        compatible.append(record)
    return compatible


def _reason(schema: pa.Schema, types: Mapping[str, pa.DataType]) -> str | None:
    """Return why rows of a schema are incompatible; None if they are compatible."""
    differences = [
        f"{column.name} is {column.type}, the feature table holds {types[column.name]}"
        for column in schema
        if column.name in types and not same_type(types[column.name], column.type)
    ]
    return "; ".join(differences) or None


def _with_all_bad(
    record: PushRecord,
    types: Mapping[str, pa.DataType],
    reason: str,
    names: Callable[[str], SourceNames],
) -> PushRecord:
    good = record.good
    raw = _raw(good, names(record.view_version)) if good.num_rows else []
    moved = pa.table(
        {
            POSITION: good[POSITION],
            "reason": pa.array([reason] * good.num_rows, pa.string()),
            "raw": pa.array(raw, pa.string()),
        }
    )
    schema = pa.schema([pa.field(column.name, types.get(column.name, column.type)) for column in good.schema])
    bad = pa.concat_tables([record.bad.select(moved.column_names), moved]).sort_by(POSITION)
    return replace(record, good=schema.empty_table(), bad=bad)


def _raw(good: pa.Table, names: SourceNames) -> list[str]:
    """Return rows as JSON for quarantine: as rows of the source, or under `stored` if they went through a transform.

    Transformed rows cannot be replayed.
    """
    rows = good.drop_columns([POSITION]).to_pylist()
    if names.has_transform:
        return [json.dumps({"stored": row}, default=json_form) for row in rows]
    source_name = {EVENT: names.event, CREATED: names.created, DELETED: names.deleted}
    return [
        json.dumps({source_name.get(name, name): value for name, value in row.items()}, default=json_form)
        for row in rows
    ]
