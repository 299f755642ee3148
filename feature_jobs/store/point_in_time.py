"""The point-in-time join: for an entity row at t, the newest thing that was known about it at t.

A feature row is available from v = max(event_timestamp, created_timestamp). Of the rows with v <= t, the one with the
greatest (event_timestamp, created_timestamp, ingest_seq) counts. That is not an as-of join over event time with a
filter on created time: a row that arrives late must neither be seen early nor replace a newer one. So the greatest row
so far is kept as a running maximum along v, and one as-of join on v finds where an entity row stands. Time-to-live is
applied last: an answer that has expired is no answer, and no older row takes its place. A tombstone is a row like any
other until it is the answer, which then is none.

Pure functions over Polars frames; times are UTC microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import polars as pl

EVENT, CREATED, SEQ = "event_timestamp", "created_timestamp", "ingest_seq"
DELETED = "deleted"
"""Bool column of tombstones, in the tables of views that have them; a frame without it holds none."""
AVAILABLE = pl.max_horizontal(EVENT, CREATED)
_RANK, _V, _T, _POSITION = "__rank", "__available", "__at", "__position"


def join(
    entities: pl.DataFrame,
    features: pl.DataFrame,
    *,
    keys: Sequence[str],
    columns: Sequence[str],
    ttl: timedelta | None,
) -> pl.DataFrame:
    """The features of each entity row as they were known at its time.

    Args:
        entities: the keys and `event_timestamp`, in any order, with repetitions; of the dtypes the features have.
        features: the keys, `event_timestamp`, `created_timestamp`, `ingest_seq` (unique) and the columns; with
            `deleted` where there may be tombstones.
        keys: columns that identify an entity; a null matches nothing.
        columns: feature columns to give.
        ttl: age of the event at which a value no longer counts; an age of exactly `ttl` still does.

    Returns:
        The columns, one row per entity row in the same order; nulls where nothing was known.
    """
    # The rank in (event, created, seq) is the row's position here: taking rows by rank is taking them by position.
    ranked = features.sort(EVENT, CREATED, SEQ)
    known = (
        ranked.select(*keys, AVAILABLE.alias(_V))
        .with_row_index(_RANK)
        .sort(_V, maintain_order=True)
        .with_columns(pl.col(_RANK).cum_max().over(keys))
    )
    asked = entities.select(*keys, pl.col(EVENT).alias(_T)).with_row_index(_POSITION).sort(_T)
    # Both sides are sorted on the whole, so on every key too.
    found = asked.join_asof(known, left_on=_T, right_on=_V, by=list(keys), check_sortedness=False)
    ends = [DELETED] if DELETED in features.columns else []
    answer = pl.concat([found, ranked.select(EVENT, *ends, *columns)[found[_RANK]]], how="horizontal")
    counts = [~pl.col(name) for name in ends]
    if ttl is not None:
        counts.append(pl.col(EVENT) >= pl.col(_T) - ttl)
    if counts:
        valid = pl.all_horizontal(counts)
        answer = answer.with_columns(pl.when(valid).then(pl.col(name)).alias(name) for name in columns)
    return answer.sort(_POSITION).select(columns)


def latest(
    features: pl.DataFrame, *, keys: Sequence[str], as_of: datetime, tombstones: bool = False
) -> pl.DataFrame:
    """The row of each entity that counts at one moment, by the same order; time-to-live is left to the reader.

    Args:
        features: as of `join`.
        keys: columns that identify an entity.
        as_of: the moment.
        tombstones: give a deleted entity's tombstone too, for whoever must know since when there is nothing.
    """
    newest = (
        features.filter(as_of >= AVAILABLE)
        .sort(EVENT, CREATED, SEQ)
        .unique(list(keys), keep="last", maintain_order=True)
    )
    if tombstones or DELETED not in features.columns:
        return newest
    return newest.filter(~pl.col(DELETED))
