"""Pushed rows: from JSON to rows of the feature table, by the same transform and checks as a batch of a file.

What a client wrote wrongly (an unknown name, keys of another type than the view has) refuses the push; a value that
does not fit its column is that row's alone, and goes to quarantine with its reason like a row that fails a check.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import InvalidRequest, SourceError, nearest
from feature_jobs.store.definitions.sources import Source
from feature_jobs.store.definitions.views import DTYPES, FeatureView, FileSource
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.validation import RAW, REASON, prepare
from feature_jobs.store.types.dtypes import from_json
from feature_jobs.store.types.instants import Rounding, parse
from feature_jobs.store.types.key_types import kind_of, type_of
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT

MAX_ROWS = 1000
ROW_FIELDS = frozenset({"keys", "features", EVENT, CREATED, DELETED})
POSITION = "__position"
AT_ONCE = Ahead(online_at_once=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRows:
    """Pushed rows after transform and checks."""

    good: pa.Table
    """As the feature table holds them but for what ingestion adds; `POSITION` is the place in the push."""
    bad: pa.Table
    """`POSITION`, `reason`, `raw`."""

    @property
    def reasons(self) -> list[dict[str, Any]]:
        """Which rows are bad and why, for the answer."""
        return [
            {"row": row[POSITION], "reason": row["reason"]}
            for row in self.bad.select([POSITION, "reason"]).to_pylist()
        ]


def check_rows(
    rows: Any,
    view: FeatureView,
    *,
    key_types: Mapping[str, str],
    now: dt.datetime,
    ahead: Ahead = AT_ONCE,
) -> CheckedRows:
    """Transform and check pushed rows.

    Args:
        rows: of the request, as JSON gave them.
        view: whose.
        key_types: how its keys are stored already; empty before its first row. Declared types count before them.
        now: the moment of the push.
        ahead: how far times may lie ahead of it.

    Raises:
        InvalidRequest: saying which row is no row of this view, and why.
    """
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_ROWS:
        raise InvalidRequest(f'Give "rows" as a list of 1 to {MAX_ROWS} objects.')
    for position, row in enumerate(rows):
        _check_shape(f"rows[{position}]", row, view)
    _check_keys(rows, view, {**key_types, **view.key_types})
    reasons: dict[int, str] = {}
    source = _source(rows, view)
    block = pa.table(_columns(rows, view, source, reasons))
    try:
        prepared = prepare(block, replace(view, source=source), now=now, ahead=ahead)
    except SourceError as error:
        raise InvalidRequest(f"The rows do not fit view '{view.name}': {error}") from error
    return parted(prepared, [_flat(row, view) for row in rows], reasons, places=range(len(rows)))


def _flat(row: Mapping[str, Any], view: FeatureView) -> dict[str, Any]:
    """A row as the view's own source would have it."""
    source = view.source
    times = {source.event_timestamp: row.get(EVENT), source.created_timestamp or CREATED: row.get(CREATED)}
    deleted = {source.deleted or DELETED: row.get(DELETED, False)}
    return {**row["keys"], **row.get("features", {}), **times, **deleted}


def _check_shape(where: str, row: Any, view: FeatureView) -> None:
    if not isinstance(row, dict) or row.keys() - ROW_FIELDS:
        raise InvalidRequest(f"{where} must be an object with {', '.join(sorted(ROW_FIELDS))}.")
    for name, known in (("keys", view.join_keys), ("features", [field.name for field in view.schema])):
        value = row.get(name, {} if name == "features" else None)
        if not isinstance(value, dict):
            raise InvalidRequest(f"{where}.{name} must be an object.")
        free = name == "features" and view.transform is not None
        if not free and (unknown := value.keys() - set(known)):
            guess = nearest(min(unknown), known)
            raise InvalidRequest(f"{where}.{name} has '{min(unknown)}', view '{view.name}' has not.{guess}")
    if missing := set(view.join_keys) - row["keys"].keys():
        raise InvalidRequest(f"{where}.keys lacks '{min(missing)}'.")
    if not isinstance(row.get(DELETED, False), bool):
        raise InvalidRequest(f"{where}.{DELETED} must be true or false.")


def _check_keys(rows: Sequence[Mapping[str, Any]], view: FeatureView, key_types: Mapping[str, str]) -> None:
    for key in view.join_keys:
        wanted = key_types.get(key)
        for position, row in enumerate(rows):
            value = row["keys"][key]
            given = type_of(value)
            wanted = wanted or given
            if given is None or given != wanted:
                raise InvalidRequest(f"rows[{position}].keys.{key} must be {kind_of(wanted)}, got {value!r}.")


def _source(rows: Sequence[Mapping[str, Any]], view: FeatureView) -> Source:
    """What the columns are called: a transform expects the names of the view's own source."""
    created, deleted = (
        any(row.get(CREATED) is not None for row in rows),
        any(row.get(DELETED) for row in rows),
    )
    if view.transform is None:
        return FileSource(
            "pushed",
            event_timestamp=EVENT,
            created_timestamp=CREATED if created else None,
            deleted=DELETED if deleted else None,
        )
    own = view.source
    for given, name, of_source in (
        (created, CREATED, own.created_timestamp),
        (deleted, DELETED, own.deleted),
    ):
        if given and of_source is None:
            raise InvalidRequest(
                f"View '{view.name}' has a transform, and its source has no {name}: leave it out, or declare it there."
            )
    return own


def _columns(
    rows: Sequence[Mapping[str, Any]], view: FeatureView, source: Source, reasons: dict[int, str]
) -> dict[str, pa.Array]:
    dtypes = {field.name: field.dtype for field in view.schema} if view.transform is None else {}
    names = {name: None for row in rows for name in row.get("features", {})} | dict.fromkeys(dtypes)
    columns = {key: pa.array([row["keys"][key] for row in rows]) for key in view.join_keys}
    for name in names:
        values = [row.get("features", {}).get(name) for row in rows]
        columns[name] = typed_column(name, values, dtypes.get(name), reasons, zone=view.source.zone)
    for name, of_source in ((EVENT, source.event_timestamp), (CREATED, source.created_timestamp)):
        if of_source is not None:
            times = [row.get(name) for row in rows]
            columns[of_source] = instants(name, times, reasons, zone=view.source.zone)
    if source.deleted is not None:
        columns[source.deleted] = pa.array([bool(row.get(DELETED)) for row in rows])
    return columns


def instants(
    name: str, values: list[Any], reasons: dict[int, str], *, zone: str | None, kind: str = "instant"
) -> pa.Array:
    """Event or created times from text, rounded up; one that is no instant is null, and its row gets a reason."""
    found = [parse(value, zone, Rounding.up) for value in values]
    _mark(found, values, f"{name} is no {kind}", reasons)
    return pa.array(found, DTYPES["timestamp"])


def typed_column(
    name: str, values: list[Any], dtype: str | None, reasons: dict[int, str], *, zone: str | None = None
) -> pa.Array:
    """JSON values of one dtype; one that is not is null here, and its row gets a reason.

    Args:
        name: of the column.
        values: as JSON gave them.
        dtype: None where a transform makes the features.
        reasons: by row; added to.
        zone: of times without one.

    Raises:
        InvalidRequest: no dtype is given, and the values are of several.
    """
    if dtype is None:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError) as error:  # whose words quote the value
            raise InvalidRequest(f"The values of '{name}' are not of one type.") from error
    fitting = [None if value is None else _converted(value, dtype, zone) for value in values]
    _mark(fitting, values, f"{name} is no {dtype}", reasons)
    return pa.array(fitting, DTYPES[dtype])


def _mark(converted: Sequence[Any], values: Sequence[Any], said: str, reasons: dict[int, str]) -> None:
    """Give the rows whose value could not be converted a reason."""
    for position, (one, value) in enumerate(zip(converted, values, strict=True)):
        if value is not None and one is None:
            reasons[position] = f"{reasons[position]}; {said}" if position in reasons else said


def _converted(value: Any, dtype: str, zone: str | None) -> Any:
    """A JSON value as the type wants it; None where it does not fit."""
    try:
        return parse(value, zone, Rounding.exact) if dtype == "timestamp" else from_json(value, dtype)
    except ValueError:
        return None


def parted(
    prepared: pa.Table,
    rows: Sequence[Mapping[str, Any]],
    reasons: Mapping[int, str],
    *,
    places: Sequence[int],
) -> CheckedRows:
    """Good and bad rows; a value that did not fit counts before what the checks say of its null.

    Args:
        prepared: what `prepare` gave.
        rows: as they came.
        reasons: of rows with values that did not fit.
        places: `POSITION` of each row.
    """
    said = prepared[REASON].to_pylist()
    for position, reason in reasons.items():
        said[position] = reason
    table = prepared.append_column(POSITION, pa.array(places, pa.int64()))
    bad = [position for position, reason in enumerate(said) if reason is not None]
    return CheckedRows(
        good=table.filter(pc.is_null(pa.array(said, pa.string()))).drop_columns([REASON, RAW]),
        bad=pa.table(
            {
                POSITION: pa.array([places[position] for position in bad], pa.int64()),
                "reason": pa.array([said[position] for position in bad], pa.string()),
                "raw": pa.array([json.dumps(rows[position]) for position in bad], pa.string()),
            }
        ),
    )
