"""Pushed rows that a feature table cannot take, set aside.

A push is checked when it comes. The table may have got columns of other types since: from a batch of files with keys of
another type, or from a changed definition. Such rows must not stop the rows behind them, so they go to quarantine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa

from feature_jobs.store.ingestion.pushed_rows import POSITION
from feature_jobs.store.ingestion.validation import json_form
from feature_jobs.store.offline.tables import same_type
from feature_jobs.store.streaming.push_log import PushRecord
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT


class SourceNames(NamedTuple):
    """What the view's source calls the times and deletions, and whether its rows are what is stored."""

    event: str
    created: str
    deleted: str
    plain: bool
    """Without a transform a stored row is a row of the source."""


def source_names(definition: Mapping[str, Any]) -> SourceNames:
    """From a view's definition as the ledger has it."""
    source = definition["source"]
    return SourceNames(
        event=source["event_timestamp"],
        created=source.get("created_timestamp") or CREATED,
        deleted=source.get("deleted") or DELETED,
        plain=definition.get("transform") is None,
    )


def set_aside(
    records: Iterable[PushRecord],
    stored: pa.Schema | None,
    declared: Mapping[str, pa.DataType],
    names: Callable[[str], SourceNames],
) -> list[PushRecord]:
    """The records, with the rows that do not fit among the bad ones.

    Args:
        records: in the order of the log.
        stored: the table's columns; None before its first row.
        declared: join keys and their declared types.
        names: of the source, by version of the view.

    Without a table, the first record with good rows says what the columns are, declared keys apart.
    """
    types = {column.name: column.type for column in stored or ()}
    types = {**declared, **types}
    fitting = []
    for record in records:
        reason = _reason(record.good.schema, types)
        if reason is not None:
            record = _without_good(record, types, reason, names)
        elif record.good.num_rows and stored is None:
            types = {column.name: column.type for column in record.good.schema} | types
        fitting.append(record)
    return fitting


def _reason(schema: pa.Schema, types: Mapping[str, pa.DataType]) -> str | None:
    """Why rows of a schema do not fit; None where they do."""
    unlike = [
        f"{column.name} is {column.type}, the feature table holds {types[column.name]}"
        for column in schema
        if column.name in types and not same_type(types[column.name], column.type)
    ]
    return "; ".join(unlike) or None


def _without_good(
    record: PushRecord,
    types: Mapping[str, pa.DataType],
    reason: str,
    names: Callable[[str], SourceNames],
) -> PushRecord:
    good = record.good
    raw = _raw(good, names(record.view_version)) if good.num_rows else []
    aside = pa.table(
        {
            POSITION: good[POSITION],
            "reason": pa.array([reason] * good.num_rows, pa.string()),
            "raw": pa.array(raw, pa.string()),
        }
    )
    schema = pa.schema([pa.field(one.name, types.get(one.name, one.type)) for one in good.schema])
    bad = pa.concat_tables([record.bad.select(aside.column_names), aside]).sort_by(POSITION)
    return replace(record, good=schema.empty_table(), bad=bad)


def _raw(good: pa.Table, names: SourceNames) -> list[str]:
    """Rows as quarantine keeps them: those that went through a transform are kept as they are, and never replayed."""
    said = {EVENT: names.event, CREATED: names.created, DELETED: names.deleted}
    rows = [
        {said.get(name, name) if names.plain else name: value for name, value in row.items()}
        for row in good.drop_columns([POSITION]).to_pylist()
    ]
    return [json.dumps(row if names.plain else {"stored": row}, default=json_form) for row in rows]
