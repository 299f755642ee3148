"""From a source block to a validated one: transform, types, rules, and a reason for every row that fails.

A column that is missing or of the wrong type refuses the whole batch; a row that breaks a rule only goes to quarantine.
Everything here is a pure function of the block, the view and the moment of ingestion, so blocks are validated anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch, SourceError, did_you_mean
from feature_jobs.store.casting import TIME, cast_feature, cast_key, cast_time
from feature_jobs.store.definitions import DTYPES, FeatureView
from feature_jobs.store.point_in_time import DELETED

REASON, RAW = "__reason", "__raw"
FUTURE_TOLERANCE = timedelta(days=1)
"""Clocks differ; a time further ahead than this is a mistake."""


@dataclass(frozen=True, slots=True)
class _Rule:
    reason: str
    failing: pa.ChunkedArray


def prepare(block: pa.Table, view: FeatureView, *, now: datetime) -> pa.Table:
    """The block as the feature table holds it, and for every bad row the reason and what the source said.

    Args:
        block: rows as the source has them.
        view: its transform, schema and checks are used.
        now: the moment of ingestion, UTC.

    Returns:
        Join keys (int64 or string), features (declared dtypes), `event_timestamp`, `created_timestamp`, `deleted` where
        the view's source has it; then `REASON` and `RAW` (the source row as JSON), both null for good rows. A
        tombstone's values are null and no check looks at them.

    Raises:
        SchemaMismatch: a column is missing or has a type that cannot be cast without loss.
        SourceError: the transform failed, or changed the number of rows.
    """
    raw = _transformed(block, view)
    columns: dict[str, pa.ChunkedArray] = {}
    for key in view.join_keys:
        columns[key] = cast_key(_column(raw, key, view, "a join key"), name=key)
    deleted = _deleted(raw, view)
    for field in view.schema:
        column = _column(raw, field.name, view, field.dtype)
        if deleted is not None:
            column = pc.if_else(deleted, pa.scalar(None, column.type), column)
        columns[field.name] = cast_feature(column, DTYPES[field.dtype], name=field.name)
    columns |= _times(raw, view)
    if deleted is not None:
        columns[DELETED] = deleted
    table = pa.table(columns)
    reasons = _reasons(list(_rules(table, view, now)), table.num_rows)
    return table.append_column(REASON, reasons).append_column(RAW, _raw(block, reasons))


def _transformed(block: pa.Table, view: FeatureView) -> pa.Table:
    if view.transform is None:
        return block
    try:
        table = view.transform(block)
    except Exception as error:
        raise SourceError(
            f"The transform of view '{view.name}' failed on the source: {type(error).__name__}: {error}. "
            f"The source has the columns {', '.join(block.column_names)}."
        ) from error
    if not isinstance(table, pa.Table) or table.num_rows != block.num_rows:
        got = f"{table.num_rows} rows" if isinstance(table, pa.Table) else type(table).__name__
        raise SourceError(
            f"The transform of view '{view.name}' must give one row for each of {block.num_rows}, it gave {got}."
        )
    return table


def _column(table: pa.Table, name: str, view: FeatureView, expected: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise SchemaMismatch(
            f"Column '{name}' ({expected}) of view '{view.name}' is missing in the source."
            f"{did_you_mean(name, table.column_names)}"
        )
    return table[name]


def _times(raw: pa.Table, view: FeatureView) -> dict[str, pa.ChunkedArray]:
    source = view.source
    name = source.event_timestamp
    event = cast_time(_column(raw, name, view, "the event timestamp"), name=name)
    implied = pc.add(event, pa.scalar(view.created_lag, pa.duration("us")))
    if source.created_timestamp is None:
        return {"event_timestamp": event, "created_timestamp": implied}
    name = source.created_timestamp
    created = cast_time(_column(raw, name, view, "the created timestamp"), name=name)
    return {"event_timestamp": event, "created_timestamp": pc.coalesce(created, implied)}


def _deleted(raw: pa.Table, view: FeatureView) -> pa.ChunkedArray | None:
    """Which rows are tombstones, never null; None where the source has none."""
    name = view.source.deleted
    if name is None:
        return None
    column = _column(raw, name, view, "whether a row is a deletion")
    if not (pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
        raise SchemaMismatch(f"Column '{name}' should be bool, the source has {column.type}.")
    return pc.fill_null(column.cast(pa.bool_()), False)


def _rules(table: pa.Table, view: FeatureView, now: datetime) -> Iterator[_Rule]:
    for key in view.join_keys:
        yield _Rule(f"{key} is null", pc.is_null(table[key]))
    yield _Rule("event_timestamp is null", pc.is_null(table["event_timestamp"]))
    limit = pa.scalar(now + FUTURE_TOLERANCE, TIME)
    for name in ("event_timestamp", "created_timestamp"):
        yield _Rule(f"{name} lies in the future", pc.fill_null(pc.greater(table[name], limit), False))
    for check in view.checks:
        failing = check.failing(table[check.column])
        if DELETED in table.column_names and check.column not in view.join_keys:
            failing = pc.and_not(failing, table[DELETED])
        yield _Rule(check.reason, failing)


def _reasons(rules: list[_Rule], num_rows: int) -> pa.ChunkedArray:
    """All reasons of a row joined by `; `, null where there is none."""
    nothing = pa.scalar(None, pa.string())
    reasons = pa.chunked_array([pa.nulls(num_rows, pa.string())])
    for rule in rules:
        if pc.any(rule.failing).as_py():
            said = pc.if_else(rule.failing, rule.reason, nothing)
            both = pc.binary_join_element_wise(reasons, said, "; ")
            reasons = pc.coalesce(both, reasons, said)
    return reasons


def _raw(block: pa.Table, reasons: pa.ChunkedArray) -> pa.Array:
    """What the source said of the bad rows; of the others nothing is kept twice."""
    bad = np.flatnonzero(reasons.is_valid().to_numpy())
    said = [json.dumps(row, default=str) for row in block.take(bad).to_pylist()]
    positions = np.full(block.num_rows, -1)
    positions[bad] = np.arange(len(bad))
    return pa.array(said, pa.string()).take(pa.array(positions, mask=positions < 0))
