"""Check quarantined rows again, with the view's current transform and checks.

Rows of a file are prepared like a batch, with the types that their source had. Rows of a push have only JSON's types,
so they are checked like a push. Rows that an older release stored without types are also checked like a push.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.pushed_rows import MAX_ROWS, POSITION, check_rows
from feature_jobs.store.ingestion.quarantine import source_rows, source_schema
from feature_jobs.store.ingestion.validation import BATCH_LIMIT, RAW, REASON, prepare, unique_rules
from feature_jobs.store.types.batch_profile import Profile
from feature_jobs.store.types.key_types import key_fault
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT


@dataclass(frozen=True, kw_only=True, slots=True)
class RecheckedRows:
    """The rows of a quarantine file after a new check."""

    reasons: pa.ChunkedArray
    """One per row: why the row stays in quarantine; null if the row is good now."""
    good: pa.Table | None
    """Rows of the feature table, without the columns that ingestion adds; None if no row is good."""


def recheck_rows(
    file: pa.Table,
    view: FeatureView,
    *,
    now: dt.datetime,
    baseline: Profile | None,
    ahead: FutureLimit = BATCH_LIMIT,
    key_types: Mapping[str, str] | None = None,
) -> RecheckedRows:
    """Check the rows of a quarantine file again.

    Args:
        file: the rows, with the columns `reason` and `raw`.
        view: the view's current definition.
        now: the current time.
        baseline: profile of the last good batch.
        ahead: how far times may be ahead of `now`.
        key_types: key types of the view's feature table, if it exists.

    Raises:
        SourceError, InvalidRequest: the rows as a whole do not fit the view.
    """
    repeated_reasons = _reasons_of_repeated_rows(file, view)
    schema = source_schema(file)
    if schema is None:
        types = {**(key_types or {}), **view.key_types}
        return _recheck_as_pushed(file, repeated_reasons, view, types, now=now, ahead=ahead)
    prepared = prepare(source_rows(file, schema), view, now=now, baseline=baseline, ahead=ahead)
    reasons = pc.coalesce(prepared[REASON], repeated_reasons)
    good = prepared.filter(pc.is_null(reasons)).drop_columns([REASON, RAW])
    return RecheckedRows(reasons=reasons, good=good if good.num_rows else None)


def _reasons_of_repeated_rows(file: pa.Table, view: FeatureView) -> pa.ChunkedArray:
    """Return the reasons of rows that were not unique in their batch, and null for all other rows.

    The other row with the same values may be in the table and not in this file. So these rows stay in quarantine as
    long as the view has the rule.
    """
    stays = pa.chunked_array([pa.repeat(pa.scalar(False), file.num_rows)])
    for rule in unique_rules(view):
        stays = pc.or_(stays, pc.match_substring(file["reason"], rule.reason))
    return pc.if_else(stays, file["reason"], pa.scalar(None, pa.string()))


def _recheck_as_pushed(
    file: pa.Table,
    repeated_reasons: pa.ChunkedArray,
    view: FeatureView,
    types: dict[str, str],
    *,
    now: dt.datetime,
    ahead: FutureLimit,
) -> RecheckedRows:
    flat_rows = [json.loads(text) for text in file["raw"].to_pylist()]
    reasons: list[str | None] = repeated_reasons.to_pylist()
    for position, row in enumerate(flat_rows):
        if any(row.get(key) is None for key in view.join_keys):  # a push cannot contain such a row
            reasons[position] = file["reason"][position].as_py()
        elif reasons[position] is None:
            reasons[position] = key_fault(row, view.join_keys, types)
    to_check = [position for position, reason in enumerate(reasons) if reason is None]
    good = []
    for start in range(0, len(to_check), MAX_ROWS):
        positions = to_check[start : start + MAX_ROWS]
        rows = [_as_pushed(flat_rows[position], view) for position in positions]
        checked = check_rows(rows, view, key_types=types, now=now, ahead=ahead)
        for bad in checked.reasons:
            reasons[positions[bad["row"]]] = bad["reason"]
        if checked.good.num_rows:
            good.append(checked.good.drop_columns([POSITION]))
    return RecheckedRows(
        reasons=pa.chunked_array([pa.array(reasons, pa.string())]),
        good=pa.concat_tables(good, promote_options="default") if good else None,
    )


def _as_pushed(row: Mapping[str, Any], view: FeatureView) -> dict[str, Any]:
    """Return a source row in the form of a pushed row."""
    source = view.source
    created, deleted = source.created_timestamp or CREATED, source.deleted or DELETED
    others = {*view.join_keys, source.event_timestamp, created, deleted}
    features = row.keys() - others if view.transform else {field.name for field in view.schema} & row.keys()
    pushed = {
        "keys": {key: row[key] for key in view.join_keys},
        "features": {name: row[name] for name in row if name in features},
        EVENT: row.get(source.event_timestamp),
        # Earlier releases stored a pushed row's deletion under the platform's own name.
        DELETED: bool(row.get(deleted, row.get(DELETED))),
    }
    return pushed if row.get(created) is None else pushed | {CREATED: row[created]}
