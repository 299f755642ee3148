"""Validate a source block: transform it, cast its columns, check its rows, and give each failing row a reason.

If a column is missing or has the wrong type, the whole batch is refused. A row that breaks a rule goes to quarantine.
The result depends only on the block, the view and the time of ingestion, so a block can be validated in any process.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SchemaMismatch, SourceError, did_you_mean
from feature_jobs.store.definitions.batch_checks import Outlier, Unique
from feature_jobs.store.definitions.checks import RowCheck
from feature_jobs.store.definitions.views import DTYPES, FeatureView
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.types.batch_profile import Profile
from feature_jobs.store.types.casting import cast_feature, cast_key, cast_time, is_utf8, list_faults
from feature_jobs.store.types.dtypes import list_of
from feature_jobs.store.types.instants import TIME, Rounding, table_to_utc
from feature_jobs.store.types.key_types import RANGE, out_of_range
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT

REASON, RAW, SOURCE = "__reason", "__raw", "__source"
SOURCE_SCHEMA = b"source_schema"
"""Metadata key of the column `RAW`. The value is the source's Arrow schema, in base64."""
BATCH_LIMIT = FutureLimit()
"""Default limit for times of rows from files and databases."""
EARLIEST = datetime.min.replace(tzinfo=UTC)
"""The earliest time that Python's `datetime` can represent."""


@dataclass(frozen=True, slots=True)
class _Rule:
    reason: str
    failing: pa.ChunkedArray


def prepare(
    block: pa.Table,
    view: FeatureView,
    *,
    now: datetime,
    baseline: Profile | None = None,
    ahead: FutureLimit = BATCH_LIMIT,
) -> pa.Table:
    """Validate a whole batch.

    Args:
        block: rows of the source.
        view: the view whose transform, schema and checks apply.
        now: the time of ingestion, UTC.
        baseline: profile of the last good batch, for rules that compare with it.
        ahead: how far times may be ahead of `now`.

    Returns:
        One row per source row. Its columns are the join keys (int64 or string), features (declared dtypes),
        `event_timestamp`, `created_timestamp`, and `deleted` if the view's source has it. Then come `REASON` and `RAW`
        (the source row as JSON). `REASON` and `RAW` are null for good rows. A tombstone's values are null, and no check
        applies to them.

    Raises:
        SchemaMismatch: a column is missing, or has a type that cannot be cast without loss.
        SourceError: the transform failed, or changed the number of rows.
    """
    part = prepare_part(block, view, now=now, baseline=baseline, ahead=ahead)
    for rule in unique_rules(view):
        [failing] = find_repeated_rows([part], rule)
        part = reject(part, failing, rule.reason)
    return part.drop_columns([SOURCE]) if SOURCE in part.column_names else part


def prepare_part(
    block: pa.Table,
    view: FeatureView,
    *,
    now: datetime,
    baseline: Profile | None = None,
    ahead: FutureLimit = BATCH_LIMIT,
) -> pa.Table:
    """Validate a part of a batch like `prepare`, except for `Unique` rules, which need the whole batch.

    For a view with `Unique` rules, the last column is `SOURCE`: the source row as a struct, which `reject` needs.
    """
    transformed = _Columns(_transform(table_to_utc(block, view.source.zone, time_columns(view)), view), view)
    columns: dict[str, pa.ChunkedArray] = {}
    declared = view.key_types
    for key in view.join_keys:
        columns[key] = cast_key(transformed.column(key, "a join key"), name=key, dtype=declared.get(key))
    deleted = _deleted(transformed, view)
    for field in view.schema:
        column = transformed.column(field.name, field.dtype)
        if deleted is not None and field.name != view.event_id:
            column = pc.if_else(deleted, pa.scalar(None, column.type), column)
        columns[field.name] = cast_feature(column, DTYPES[field.dtype], name=field.name)
    columns |= _times(transformed, view)
    if deleted is not None:
        columns[DELETED] = deleted
    table = pa.table(columns)
    reasons = _reasons(list(_rules(table, view, now, baseline, ahead)), table.num_rows)
    table = table.append_column(REASON, reasons).append_column(raw_field(block.schema), _raw(block, reasons))
    return table.append_column(SOURCE, block.to_struct_array()) if unique_rules(view) else table


def time_columns(view: FeatureView) -> set[str]:
    """Return the columns of a view's source that are declared as times."""
    source = view.source
    declared = [name for name, dtype in source.columns.items() if dtype == "timestamp"]
    features = [field.name for field in view.schema if field.dtype == "timestamp"]
    return {source.event_timestamp, source.created_timestamp or source.event_timestamp, *declared, *features}


def unique_rules(view: FeatureView) -> list[Unique]:
    """Return the view's rules that need the whole batch to find bad rows."""
    return [check for check in view.checks if isinstance(check, Unique)]


def find_repeated_rows(parts: Sequence[pa.Table], rule: Unique) -> list[pa.Array]:
    """Return for each part one bool per row: true if the rule rejects the row.

    Rows that are bad already are ignored.

    Args:
        parts: the batch in the order of the source. Only `REASON` and the rule's columns are needed.
        rule: a rule of the view.
    """
    whole = pa.concat_tables([part.select([*rule.of, REASON]) for part in parts])
    good = pc.is_null(whole[REASON])
    failing = np.zeros(whole.num_rows, dtype=bool)
    failing[np.flatnonzero(good.to_numpy())] = rule.failing_mask(whole.filter(good)).to_numpy(
        zero_copy_only=False
    )
    ends = np.cumsum([part.num_rows for part in parts])[:-1]
    return [pa.array(part) for part in np.split(failing, ends)]


def reject(part: pa.Table, failing: pa.Array, reason: str) -> pa.Table:
    """Mark some good rows of a part as bad, with a reason. The part needs the column `SOURCE`."""
    reasons = pa.chunked_array([pc.if_else(failing, reason, pa.scalar(None, pa.string()))])
    raw = _raw(pa.Table.from_struct_array(part[SOURCE].combine_chunks()), reasons)
    for name, values in ((REASON, reasons), (RAW, raw)):
        position = part.schema.get_field_index(name)
        part = part.set_column(position, part.schema.field(position), pc.coalesce(part[name], values))
    return part


def _transform(block: pa.Table, view: FeatureView) -> pa.Table:
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
        result = f"{table.num_rows} rows" if isinstance(table, pa.Table) else type(table).__name__
        raise SourceError(
            f"The transform of view '{view.name}' must give one row for each of {block.num_rows}, it gave {result}."
        )
    return table


class _Columns:
    """Finds columns of a transformed block. Counts the names once, because Arrow builds its list at each call."""

    def __init__(self, table: pa.Table, view: FeatureView) -> None:
        self._table, self._view = table, view
        self._counts = Counter(table.column_names)

    def column(self, name: str, expected: str) -> pa.ChunkedArray:
        """Return the column with a name.

        Raises:
            SchemaMismatch: the block has no column with this name, or several.
        """
        count = self._counts[name]
        if count == 0:
            raise SchemaMismatch(
                f"Column '{name}' ({expected}) of view '{self._view.name}' is missing."
                f"{did_you_mean(name, self._counts)}"
            )
        if count > 1:
            raise SchemaMismatch(f"The source of view '{self._view.name}' has {count} columns '{name}'.")
        return self._table[name]


def _times(columns: _Columns, view: FeatureView) -> dict[str, pa.ChunkedArray]:
    source = view.source
    name = source.event_timestamp
    event = cast_time(columns.column(name, "the event timestamp"), name=name, rounding=Rounding.up)
    implied = pc.add(event, pa.scalar(view.created_lag, pa.duration("us")))
    if source.created_timestamp is None:
        return {EVENT: event, CREATED: implied}
    name = source.created_timestamp
    column = columns.column(name, "the created timestamp")
    created = cast_time(column, name=name, rounding=Rounding.up)
    return {EVENT: event, CREATED: pc.coalesce(created, implied)}


def _deleted(columns: _Columns, view: FeatureView) -> pa.ChunkedArray | None:
    """Return a non-null bool per row: true for tombstones. None if the source has no such column."""
    name = view.source.deleted
    if name is None:
        return None
    column = columns.column(name, "whether a row is a deletion")
    if not (pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
        raise SchemaMismatch(f"Column '{name}' should be bool, the source has {column.type}.")
    return pc.fill_null(column.cast(pa.bool_()), False)


def _rules(
    table: pa.Table, view: FeatureView, now: datetime, baseline: Profile | None, ahead: FutureLimit
) -> Iterator[_Rule]:
    for key in view.join_keys:
        yield _Rule(f"{key} is null", pc.is_null(table[key]))
        if (beyond := out_of_range(table[key])) is not None:
            yield _Rule(f"{key} is outside {RANGE}", beyond)
    if view.event_id is not None:
        yield _Rule(f"{view.event_id} is null", pc.is_null(table[view.event_id]))
    yield _Rule(f"{EVENT} is null", pc.is_null(table[EVENT]))
    latest, start = pa.scalar(now + ahead.limit, TIME), pa.scalar(EARLIEST, TIME)
    for name, label in ((EVENT, EVENT), (CREATED, _created_label(view))):
        yield _Rule(f"{label} lies in the future", ahead.failing_mask(name, table, latest, view.created_lag))
        yield _Rule(f"{name} lies before the year 1", pc.fill_null(pc.less(table[name], start), False))
    for field in view.schema:
        if (list_type := list_of(field.dtype)) is not None:
            for problem, failing in list_faults(table[field.name], list_type.length):
                yield _Rule(f"{field.name} {problem}", failing)
    keys, has_tombstones = set(view.join_keys), DELETED in table.column_names
    for check in view.checks:
        if isinstance(check, RowCheck | Outlier):
            failing = _failing(check, table[check.column], baseline)
            if has_tombstones and check.column not in keys:
                failing = pc.and_not(failing, table[DELETED])
            yield _Rule(check.reason, failing)


def _created_label(view: FeatureView) -> str:
    """Return the name of the created time for a reason."""
    implied = view.source.created_timestamp is None and view.created_lag
    return f"{CREATED} ({EVENT} + created_lag)" if implied else CREATED


def _failing(check: RowCheck | Outlier, column: pa.ChunkedArray, baseline: Profile | None) -> pa.ChunkedArray:
    """Return which rows fail a rule. The rule may not fit a join key's type, which is known only here."""
    try:
        if isinstance(check, Outlier):
            return check.failing_mask(column, baseline)
        return check.failing_mask(column)
    except (pa.ArrowException, TypeError) as error:
        raise SchemaMismatch(
            f"The rule {type(check).__name__} does not fit column '{check.column}', which is {column.type}: {error}."
        ) from error


def _reasons(rules: list[_Rule], num_rows: int) -> pa.ChunkedArray:
    """Return all reasons of a row joined by `; `, and null for a good row."""
    null = pa.scalar(None, pa.string())
    reasons = pa.chunked_array([pa.nulls(num_rows, pa.string())])
    for rule in rules:
        if pc.any(rule.failing).as_py():
            new = pc.if_else(rule.failing, rule.reason, null)
            both = pc.binary_join_element_wise(reasons, new, "; ")
            reasons = pc.coalesce(both, reasons, new)
    return reasons


def raw_field(source: pa.Schema) -> pa.Field:
    """Return the column `RAW`. Its metadata has the source's types, so that the rows can be read back unchanged."""
    types = base64.b64encode(source.remove_metadata().serialize())
    return pa.field(RAW, pa.string(), metadata={SOURCE_SCHEMA: types})


def _raw(block: pa.Table, reasons: pa.ChunkedArray) -> pa.Array:
    """Return the source row as JSON for bad rows, and null for good rows, which are stored anyway."""
    bad = np.flatnonzero(reasons.is_valid().to_numpy())
    rows = block.take(bad)
    try:
        texts = [json.dumps(row, default=json_form) for row in rows.to_pylist()]
    except (
        OverflowError,
        ValueError,
    ):  # a year outside the range of Python's dates, or text that is not UTF-8
        texts = [json.dumps(row, default=json_form) for row in _printable(rows).to_pylist()]
    positions = np.full(block.num_rows, -1)
    positions[bad] = np.arange(len(bad))
    return pa.array(texts, pa.string()).take(pa.array(positions, mask=positions < 0))


def _printable(rows: pa.Table) -> pa.Table:
    """Return the rows with times as integers of their unit, and text that is not UTF-8 as bytes."""
    columns = []
    for field, column in zip(rows.schema, rows.columns, strict=True):
        if pa.types.is_timestamp(field.type) or pa.types.is_date64(field.type):
            column = column.cast(pa.int64())
        elif pa.types.is_date32(field.type):
            column = column.cast(pa.int32())
        elif not is_utf8(column):
            column = column.cast(pa.binary())
        columns.append(column)
    return pa.table(columns, names=rows.column_names)


def json_form(value: object) -> str:
    """Return text for a value that has no JSON type: base64 for bytes, Python's own text for times and decimals."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
