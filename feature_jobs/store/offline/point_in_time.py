"""The point-in-time join: for an entity row at time t, the newest values that were known at t.

A feature row is available from v = max(event_timestamp, created_timestamp). Of the rows with v <= t, the join returns
the one with the greatest (event_timestamp, created_timestamp, ingest_seq). An as-of join over event time with a filter
on created time would be wrong: a row that arrives late must not be seen early, and must not replace a newer row.

The algorithm:

1. Sort the rows by (v, event, created, seq).
2. Drop a row if an earlier row of its entity in this order has a greater event time: it can never be the result.
3. Do one as-of join on v.
4. Apply the TTL: an expired row is no result, and no older row replaces it. A tombstone is joined like any other
   row; if it is the result, the entity row has no values.

In step 2, only event times must be compared. Of two rows with the same event time, the later row in this order is also
the greater one, because v grows with the created time. For the same reason, a sort by event time only has to be stable.

All functions are pure, over Polars frames. Times are UTC microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

AVAILABLE = pl.max_horizontal(EVENT, CREATED)
_V, _T, _ROW, _POSITION, _ABSENT = "__available", "__at", "__row", "__position", "__none"
_LATE = pl.col(CREATED) > pl.col(EVENT)


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinResult:
    """The result of a join."""

    columns: pl.DataFrame
    """The features, one row for each entity row in the same order; null if nothing was known."""
    hidden: int
    """Number of entity rows that have no result only because of the cutoff; 0 if the cutoff is off."""
    absent: pl.Series
    """Which entity rows have no result. The others may still have nulls that come from the source."""


def join_features(
    entities: pl.DataFrame,
    features: pl.DataFrame,
    *,
    keys: Sequence[str],
    columns: Sequence[str],
    ttl: timedelta | None,
    cutoff: bool = True,
    ordered: bool = False,
) -> JoinResult:
    """Join each entity row with the features that were known at its time.

    Args:
        entities: join keys and `event_timestamp`, in any order, repetitions allowed; same dtypes as in `features`.
        features: join keys, `event_timestamp`, `created_timestamp`, `ingest_seq` (unique) and the feature columns;
            also `deleted` if there may be tombstones.
        keys: join keys. A null key matches nothing.
        columns: feature columns to return.
        ttl: greatest age at which a value is valid. An older value is expired.
        cutoff: whether to hide rows that were created after the entity row's time. If false, only event times are
            compared.
        ordered: whether `features` is already sorted by (available, event, created, seq). Then `ingest_seq` is
            optional.
    """
    rows = features if ordered else features.sort(AVAILABLE, EVENT, CREATED, SEQ)
    if not cutoff:
        rows = rows.sort(EVENT, maintain_order=True)
    rows = rows.with_columns((AVAILABLE if cutoff else pl.col(EVENT)).alias(_V)).with_row_index(_ROW)
    candidates = _unbeaten(rows, keys) if cutoff else rows
    requests = entities.select(*keys, pl.col(EVENT).alias(_T)).with_row_index(_POSITION).sort(_T)
    deleted = [DELETED] if DELETED in features.columns else []
    joined = _as_of(requests, candidates, keys=keys, on=_V)
    joined = joined.hstack(rows.select(EVENT, *deleted, *columns)[joined[_ROW]])
    joined = joined.with_columns((~_is_valid(deleted, ttl)).alias(_ABSENT))
    hidden = _count_hidden(joined.filter(_ABSENT), rows, keys=keys, deleted=deleted, ttl=ttl) if cutoff else 0
    results = joined.with_columns(
        pl.when(~pl.col(_ABSENT)).then(pl.col(name)).alias(name) for name in columns
    )
    results = results.sort(_POSITION)
    return JoinResult(columns=results.select(columns), hidden=hidden, absent=results[_ABSENT])


def latest_rows(
    features: pl.DataFrame, *, keys: Sequence[str], as_of: datetime, tombstones: bool = False
) -> pl.DataFrame:
    """For each entity, return the row that a join at `as_of` would return. The TTL is not applied.

    Args:
        features: as in `join_features`.
        keys: join keys.
        as_of: the time of the join.
        tombstones: whether to return tombstones of deleted entities. Their times say when the values were deleted.
    """
    newest = (
        features.filter(as_of >= AVAILABLE)
        .sort(EVENT, CREATED, SEQ)
        .unique(list(keys), keep="last", maintain_order=True)
    )
    if tombstones or DELETED not in features.columns:
        return newest
    return newest.filter(~pl.col(DELETED))


def _unbeaten(rows: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Return the rows whose event time is not less than that of any earlier row of their entity.

    Only a row that was created after its event can be dropped. So if there is no such row, all rows stay.
    """
    if not rows.select(_LATE.any()).item():
        return rows
    return rows.select(*keys, _V, _ROW, EVENT).filter(
        pl.col(EVENT) >= pl.col(EVENT).cum_max().over(list(keys))
    )


def _as_of(requests: pl.DataFrame, rows: pl.DataFrame, *, keys: Sequence[str], on: str) -> pl.DataFrame:
    """Add the number of the last row at or before each entity row's time; null if there is no such row."""
    # Both frames are sorted as a whole, so they are sorted within each key too.
    return requests.join_asof(
        rows.select(*keys, on, _ROW), left_on=_T, right_on=on, by=list(keys), check_sortedness=False
    )


def _is_valid(deleted: Sequence[str], ttl: timedelta | None) -> pl.Expr:
    """Return whether a joined row exists, is not expired, and is not a tombstone."""
    fresh = pl.col(EVENT).is_not_null() if ttl is None else pl.col(EVENT) >= pl.col(_T) - ttl
    return pl.all_horizontal(fresh, *(~pl.col(name) for name in deleted)).fill_null(False)


def _count_hidden(
    unanswered: pl.DataFrame,
    rows: pl.DataFrame,
    *,
    keys: Sequence[str],
    deleted: Sequence[str],
    ttl: timedelta | None,
) -> int:
    """Count the entity rows that have no result only because of the cutoff.

    The cutoff hides only rows that were created after their event. So without the cutoff, the result is one of two
    rows: the joined row, or the greatest row that was created after its event. The greater of the two is used.
    """
    late = (
        rows.lazy()
        .filter(_LATE)
        .select(*keys, EVENT, _ROW)
        .join(unanswered.lazy().select(keys), on=list(keys), how="semi", maintain_order="left")
        .sort(EVENT, maintain_order=True)
        .collect()
    )
    if late.is_empty():
        return 0
    requests = unanswered.select(*keys, _T, pl.col(EVENT).alias("__event"), pl.col(_ROW).alias("__found"))
    joined = _as_of(requests, late, keys=keys, on=EVENT)
    joined = joined.drop(EVENT, strict=False).hstack(rows.select(EVENT, *deleted)[joined[_ROW]])
    is_newer = pl.any_horizontal(
        pl.col("__event").is_null(),
        pl.col(EVENT) > pl.col("__event"),
        (pl.col(EVENT) == pl.col("__event")) & (pl.col(_ROW) > pl.col("__found")),
    )
    return joined.filter(is_newer.fill_null(False) & _is_valid(deleted, ttl)).height
