"""Turn pushed JSON rows into rows of the feature table, with the same transform and checks as for a file.

Two kinds of mistakes are treated differently. A mistake in the form of the request (an unknown name, a key of another
type than the view has) refuses the whole push. A value that does not fit its column affects only its own row, which
goes to quarantine with a reason, like a row that fails a check.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import InvalidRequest, SourceError, suggest_name
from feature_jobs.store.definitions.sources import Source
from feature_jobs.store.definitions.views import DTYPES, FeatureView, FileSource
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.validation import RAW, REASON, prepare
from feature_jobs.store.types.dtypes import from_json
from feature_jobs.store.types.instants import Rounding, parse_instant
from feature_jobs.store.types.key_types import describe_key_type, key_type_of
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT

MAX_ROWS = 1000
ROW_FIELDS = frozenset({"keys", "features", EVENT, CREATED, DELETED})
POSITION = "__position"
ONLINE_FUTURE_LIMIT = FutureLimit(online_at_once=True)
"""Default limit for times of rows that go online at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRows:
    """Pushed rows after transform and checks."""

    good: pa.Table
    """Rows of the feature table, without the columns that ingestion adds. `POSITION` is the row's index in the push."""
    bad: pa.Table
    """Columns `POSITION`, `reason`, `raw`."""

    @property
    def reasons(self) -> list[dict[str, Any]]:
        """The bad rows' indices and reasons, in the form of the HTTP answer."""
        return [
            {"row": row[POSITION], "reason": row["reason"]}
            for row in self.bad.select([POSITION, "reason"]).to_pylist()
        ]


def bad_rows(positions: Sequence[int], reasons: Sequence[str], raw: Sequence[str]) -> pa.Table:
    """Return a table for `CheckedRows.bad`."""
    return pa.table(
        {
            POSITION: pa.array(positions, pa.int64()),
            "reason": pa.array(reasons, pa.string()),
            "raw": pa.array(raw, pa.string()),
        }
    )


def check_rows(
    rows: Any,
    view: FeatureView,
    *,
    key_types: Mapping[str, str],
    now: dt.datetime,
    ahead: FutureLimit = ONLINE_FUTURE_LIMIT,
) -> CheckedRows:
    """Transform and check pushed rows.

    Args:
        rows: the request's rows, as parsed from JSON.
        view: the view that the rows are for.
        key_types: stored types of the view's keys; empty before its first row. Declared types have priority.
        now: the time of the push.
        ahead: how far times may be ahead of `now`.

    Raises:
        InvalidRequest: the request has a wrong form; the message names the row and the mistake.
    """
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_ROWS:
        raise InvalidRequest(f'Give "rows" as a list of 1 to {MAX_ROWS} objects.')
    for position, row in enumerate(rows):
        _validate_shape(f"rows[{position}]", row, view)
    _validate_keys(rows, view, {**key_types, **view.key_types})
    reasons: dict[int, str] = {}
    source = _source(rows, view)
    block = pa.table(_columns(rows, view, source, reasons))
    try:
        prepared = prepare(block, replace(view, source=source), now=now, ahead=ahead)
    except SourceError as error:
        raise InvalidRequest(f"The rows do not fit view '{view.name}': {error}") from error
    return split_rows(prepared, [_flat_row(row, view) for row in rows], reasons, positions=range(len(rows)))


def _flat_row(row: Mapping[str, Any], view: FeatureView) -> dict[str, Any]:
    """Return a pushed row with the column names of the view's own source."""
    source = view.source
    times = {source.event_timestamp: row.get(EVENT), source.created_timestamp or CREATED: row.get(CREATED)}
    deleted = {source.deleted or DELETED: row.get(DELETED, False)}
    return {**row["keys"], **row.get("features", {}), **times, **deleted}


def _validate_shape(path: str, row: Any, view: FeatureView) -> None:
    if not isinstance(row, dict) or row.keys() - ROW_FIELDS:
        raise InvalidRequest(f"{path} must be an object with {', '.join(sorted(ROW_FIELDS))}.")
    for name, known in (("keys", view.join_keys), ("features", [field.name for field in view.schema])):
        value = row.get(name, {} if name == "features" else None)
        if not isinstance(value, dict):
            raise InvalidRequest(f"{path}.{name} must be an object.")
        is_any_name_allowed = name == "features" and view.transform is not None
        if not is_any_name_allowed and (unknown := value.keys() - set(known)):
            guess = suggest_name(min(unknown), known)
            raise InvalidRequest(f"{path}.{name} has '{min(unknown)}', view '{view.name}' has not.{guess}")
    if missing := set(view.join_keys) - row["keys"].keys():
        raise InvalidRequest(f"{path}.keys lacks '{min(missing)}'.")
    if not isinstance(row.get(DELETED, False), bool):
        raise InvalidRequest(f"{path}.{DELETED} must be true or false.")


def _validate_keys(
    rows: Sequence[Mapping[str, Any]], view: FeatureView, key_types: Mapping[str, str]
) -> None:
    for key in view.join_keys:
        expected = key_types.get(key)
        for position, row in enumerate(rows):
            value = row["keys"][key]
            actual = key_type_of(value)
            expected = expected or actual
            if actual is None or actual != expected:
                raise InvalidRequest(
                    f"rows[{position}].keys.{key} must be {describe_key_type(expected)}, got {value!r}."
                )


def _source(rows: Sequence[Mapping[str, Any]], view: FeatureView) -> Source:
    """Return a source that names the rows' columns. A transform expects the names of the view's own source."""
    has_created = any(row.get(CREATED) is not None for row in rows)
    has_deleted = any(row.get(DELETED) for row in rows)
    if view.transform is None:
        return FileSource(
            "pushed",
            event_timestamp=EVENT,
            created_timestamp=CREATED if has_created else None,
            deleted=DELETED if has_deleted else None,
        )
    source = view.source
    for is_pushed, name, source_column in (
        (has_created, CREATED, source.created_timestamp),
        (has_deleted, DELETED, source.deleted),
    ):
        if is_pushed and source_column is None:
            raise InvalidRequest(
                f"View '{view.name}' has a transform, and its source has no {name}: leave it out, or declare it there."
            )
    return source


def _columns(
    rows: Sequence[Mapping[str, Any]], view: FeatureView, source: Source, reasons: dict[int, str]
) -> dict[str, pa.Array]:
    dtypes = {field.name: field.dtype for field in view.schema} if view.transform is None else {}
    names = {name: None for row in rows for name in row.get("features", {})} | dict.fromkeys(dtypes)
    columns = {key: pa.array([row["keys"][key] for row in rows]) for key in view.join_keys}
    for name in names:
        values = [row.get("features", {}).get(name) for row in rows]
        columns[name] = typed_column(name, values, dtypes.get(name), reasons, zone=view.source.zone)
    for name, source_column in ((EVENT, source.event_timestamp), (CREATED, source.created_timestamp)):
        if source_column is not None:
            times = [row.get(name) for row in rows]
            columns[source_column] = parse_times(name, times, reasons, zone=view.source.zone)
    if source.deleted is not None:
        columns[source.deleted] = pa.array([bool(row.get(DELETED)) for row in rows])
    return columns


def parse_times(
    name: str, values: list[Any], reasons: dict[int, str], *, zone: str | None, kind: str = "instant"
) -> pa.Array:
    """Parse event or created times from text, and round them up to microseconds.

    A value that cannot be parsed becomes null, and its row gets a reason.
    """
    times = [parse_instant(value, zone, Rounding.up) for value in values]
    _add_reasons(times, values, f"{name} is no {kind}", reasons)
    return pa.array(times, DTYPES["timestamp"])


def typed_column(
    name: str, values: list[Any], dtype: str | None, reasons: dict[int, str], *, zone: str | None = None
) -> pa.Array:
    """Convert JSON values to one dtype. A value that does not fit becomes null, and its row gets a reason.

    Args:
        name: name of the column.
        values: values as parsed from JSON.
        dtype: dtype of the column; None if a transform makes the features.
        reasons: reasons by row index; new reasons are added.
        zone: time zone of times that have none.

    Raises:
        InvalidRequest: `dtype` is None, and the values are of several types.
    """
    if dtype is None:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError) as error:  # Arrow's message quotes the value
            raise InvalidRequest(f"The values of '{name}' are not of one type.") from error
    converted = [None if value is None else _convert(value, dtype, zone) for value in values]
    _add_reasons(converted, values, f"{name} is no {dtype}", reasons)
    return pa.array(converted, DTYPES[dtype])


def _add_reasons(
    converted: Sequence[Any], values: Sequence[Any], reason: str, reasons: dict[int, str]
) -> None:
    """Add a reason for each row whose value could not be converted."""
    for position, (result, value) in enumerate(zip(converted, values, strict=True)):
        if value is not None and result is None:
            reasons[position] = f"{reasons[position]}; {reason}" if position in reasons else reason


def _convert(value: Any, dtype: str, zone: str | None) -> Any:
    """Return a JSON value converted to a dtype, or None if it does not fit."""
    try:
        return parse_instant(value, zone, Rounding.exact) if dtype == "timestamp" else from_json(value, dtype)
    except ValueError:
        return None


def split_rows(
    prepared: pa.Table,
    rows: Sequence[Mapping[str, Any]],
    reasons: Mapping[int, str],
    *,
    positions: Sequence[int],
) -> CheckedRows:
    """Split prepared rows into good and bad rows.

    A row in `reasons` gets that reason instead of the checks' reason, because the checks saw only a null.

    Args:
        prepared: result of `prepare`.
        rows: the rows as they were received.
        reasons: reasons by row index, for values that did not fit.
        positions: `POSITION` of each row.
    """
    all_reasons = prepared[REASON].to_pylist()
    for index, reason in reasons.items():
        all_reasons[index] = reason
    table = prepared.append_column(POSITION, pa.array(positions, pa.int64()))
    bad = [index for index, reason in enumerate(all_reasons) if reason is not None]
    return CheckedRows(
        good=table.filter(pc.is_null(pa.array(all_reasons, pa.string()))).drop_columns([REASON, RAW]),
        bad=bad_rows(
            [positions[index] for index in bad],
            [all_reasons[index] for index in bad],
            [json.dumps(rows[index]) for index in bad],
        ),
    )
