"""The point-in-time join: for an entity row at time t, the newest values that were known at t.

A feature row is available from v = max(event_timestamp, created_timestamp). Of the rows with v <= t, the join returns
the one with the greatest (event_timestamp, created_timestamp, ingest_seq). An as-of join over event time with a filter
on created time would be wrong: a row that arrives late must not be seen early, and must not replace a newer row.

The algorithm:

1. Sort the rows by (v, event, created, seq).
2. A row is outdated if an earlier row of its entity in this order has a greater event time: it can never be the result.
3. Find the entity's last row with v <= t that is not outdated (`newest_rows.py`).
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

import numpy as np
import polars as pl

from feature_jobs.store.offline.newest_rows import Bools, Ints
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

AVAILABLE = pl.max_horizontal(EVENT, CREATED)


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinResult:
    """The result of a join."""

    columns: pl.DataFrame
    """The features, one row for each entity row in the same order; null if nothing was known."""
    hidden: int
    """Number of entity rows that have no result only because of the cutoff; 0 if the cutoff is off."""
    absent: pl.Series
    """Which entity rows have no result. The others may still have nulls that come from the source."""


def order_of(rows: pl.DataFrame) -> Ints:
    """Return the positions of the rows in order of (available, event, created, seq)."""
    order = rows.select(pl.arg_sort_by(AVAILABLE, EVENT, CREATED, SEQ)).to_series()
    return order.to_numpy().astype(np.int64)


def take_or_null(rows: pl.DataFrame, positions: Ints, absent: Bools) -> pl.DataFrame:
    """Return the rows at some positions, and nulls where a row is absent."""
    index = pl.DataFrame({"at": positions, "absent": absent}).select(
        pl.when(~pl.col("absent")).then(pl.col("at"))
    )
    return rows.select(pl.all().gather(index.to_series()))


def microseconds(duration: timedelta | None) -> int | None:
    """Return a duration as whole microseconds."""
    return None if duration is None else duration // timedelta(microseconds=1)


def latest_rows(
    features: pl.DataFrame, *, keys: Sequence[str], as_of: datetime, tombstones: bool = False
) -> pl.DataFrame:
    """For each entity, return the row that a join at `as_of` would return. The TTL is not applied.

    Args:
        features: join keys, `event_timestamp`, `created_timestamp`, `ingest_seq` (unique) and any other columns; also
            `deleted` if there may be tombstones.
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
