"""Quarantined rows tried again: through the view's transform and checks as they are now.

Rows of a file go the way of a batch, with the types that their source had. Rows of a push had no types but those of
JSON, and go the way of a push; so do rows that a release kept which remembered none.
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
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.profile import Profile
from feature_jobs.store.ingestion.pushed_rows import MAX_ROWS, POSITION, check_rows
from feature_jobs.store.ingestion.quarantine import source_rows, source_schema
from feature_jobs.store.ingestion.validation import FILES, RAW, REASON, prepare, unique_rules
from feature_jobs.store.types.key_types import reason_against
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """What became of the rows of a quarantine file."""

    reasons: pa.ChunkedArray
    """One a row: why it stays, null where it is good now."""
    good: pa.Table | None
    """As the feature table holds them but for what ingestion adds; none where there is none."""


def try_again(
    file: pa.Table,
    view: FeatureView,
    *,
    now: dt.datetime,
    baseline: Profile | None,
    ahead: Ahead = FILES,
    key_types: Mapping[str, str] | None = None,
) -> Tried:
    """Check the rows of a quarantine file.

    Args:
        file: `reason` and `raw`, and whatever else it has.
        view: as it is now.
        now: the moment.
        baseline: of the last good batch.
        ahead: how far times may lie ahead of it.
        key_types: of the view's feature table, where it has one.

    Raises:
        SourceError, InvalidRequest: the rows do not fit the view at all.
    """
    alike = _alike(file, view)
    schema = source_schema(file)
    if schema is None:
        return _pushed(file, alike, view, {**(key_types or {}), **view.key_types}, now=now, ahead=ahead)
    prepared = prepare(source_rows(file, schema), view, now=now, baseline=baseline, ahead=ahead)
    reasons = pc.coalesce(prepared[REASON], alike)
    good = prepared.filter(pc.is_null(reasons)).drop_columns([REASON, RAW])
    return Tried(reasons=reasons, good=good if good.num_rows else None)


def _alike(file: pa.Table, view: FeatureView) -> pa.ChunkedArray:
    """The reasons of rows that were put aside because the batch had others like them.

    What they are like may have been stored, and is not in the file: as long as the view has the rule, they stay.
    """
    stays = pa.chunked_array([pa.repeat(pa.scalar(False), file.num_rows)])
    for rule in unique_rules(view):
        stays = pc.or_(stays, pc.match_substring(file["reason"], rule.reason))
    return pc.if_else(stays, file["reason"], pa.scalar(None, pa.string()))


def _pushed(
    file: pa.Table,
    alike: pa.ChunkedArray,
    view: FeatureView,
    types: dict[str, str],
    *,
    now: dt.datetime,
    ahead: Ahead,
) -> Tried:
    flat = [json.loads(text) for text in file["raw"].to_pylist()]
    reasons: list[str | None] = alike.to_pylist()
    for position, row in enumerate(flat):
        if any(row.get(key) is None for key in view.join_keys):  # no push has such a row
            reasons[position] = file["reason"][position].as_py()
        elif reasons[position] is None:
            reasons[position] = reason_against(row, view.join_keys, types)
    open_ones = [position for position, reason in enumerate(reasons) if reason is None]
    good = []
    for start in range(0, len(open_ones), MAX_ROWS):
        places = open_ones[start : start + MAX_ROWS]
        rows = [_as_pushed(flat[place], view) for place in places]
        checked = check_rows(rows, view, key_types=types, now=now, ahead=ahead)
        for said in checked.reasons:
            reasons[places[said["row"]]] = said["reason"]
        if checked.good.num_rows:
            good.append(checked.good.drop_columns([POSITION]))
    whole = pa.concat_tables(good, promote_options="default") if good else None
    return Tried(reasons=pa.chunked_array([pa.array(reasons, pa.string())]), good=whole)


def _as_pushed(row: Mapping[str, Any], view: FeatureView) -> dict[str, Any]:
    """A row as its source would have it, in the shape of a push."""
    source = view.source
    created, deleted = source.created_timestamp or CREATED, source.deleted or DELETED
    others = {*view.join_keys, source.event_timestamp, created, deleted}
    known = row.keys() - others if view.transform else {field.name for field in view.schema} & row.keys()
    pushed = {
        "keys": {key: row[key] for key in view.join_keys},
        "features": {name: row[name] for name in row if name in known},
        EVENT: row.get(source.event_timestamp),
        # Earlier releases kept a pushed row's deletion under our own name.
        DELETED: bool(row.get(deleted, row.get(DELETED))),
    }
    return pushed if row.get(created) is None else pushed | {CREATED: row[created]}
