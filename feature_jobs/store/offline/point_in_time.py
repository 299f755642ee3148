"""The point-in-time join: for an entity row at t, the newest thing that was known about it at t.

A feature row is available from v = max(event_timestamp, created_timestamp). Of the rows with v <= t, the one with the
greatest (event_timestamp, created_timestamp, ingest_seq) counts. That is not an as-of join over event time with a
filter on created time: a row that arrives late must neither be seen early nor replace a newer one. So rows are put in
order of (v, event, created, seq), those that a row before them beats can never be an answer and go, and one as-of join
on v finds where an entity row stands. Time-to-live is applied last: an answer that has expired is no answer, and no
older row takes its place. A tombstone is a row like any other until it is the answer, which then is none.

Of two rows with the same event, the one that comes later in that order is also the greater one, because v grows with
created. So a row is beaten exactly where one before it has a greater event, and an order by event needs no more than to
be stable.

Pure functions over Polars frames; times are UTC microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import polars as pl

from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

AVAILABLE = pl.max_horizontal(EVENT, CREATED)
_V, _T, _ROW, _POSITION, _NONE = "__available", "__at", "__row", "__position", "__none"
_LATE = pl.col(CREATED) > pl.col(EVENT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What is known of each entity row."""

    columns: pl.DataFrame
    """The features, one row per entity row in the same order; nulls where nothing was known."""
    hidden: int
    """Entity rows that have no answer only because what there is was not known yet; 0 without the cutoff."""
    absent: pl.Series
    """Which entity rows have no answer at all; the others may still have nulls that the source said."""


def join(
    entities: pl.DataFrame,
    features: pl.DataFrame,
    *,
    keys: Sequence[str],
    columns: Sequence[str],
    ttl: timedelta | None,
    cutoff: bool = True,
) -> pl.DataFrame:
    """The features of each entity row as they were known at its time; arguments as of `answer`."""
    return answer(entities, features, keys=keys, columns=columns, ttl=ttl, cutoff=cutoff).columns


def answer(
    entities: pl.DataFrame,
    features: pl.DataFrame,
    *,
    keys: Sequence[str],
    columns: Sequence[str],
    ttl: timedelta | None,
    cutoff: bool = True,
    ordered: bool = False,
) -> Answers:
    """The features of each entity row as they were known at its time, and what was hidden from it.

    Args:
        entities: the keys and `event_timestamp`, in any order, with repetitions; of the dtypes the features have.
        features: the keys, `event_timestamp`, `created_timestamp`, `ingest_seq` (unique) and the columns; with
            `deleted` where there may be tombstones.
        keys: columns that identify an entity; a null matches nothing.
        columns: feature columns to give.
        ttl: age of the event at which a value no longer counts; an age of exactly `ttl` still does.
        cutoff: leave out what was created after the entity row's time; else only the event's time counts.
        ordered: the features are in order of (available, event, created, seq) already, and `ingest_seq` may lack.
    """
    rows = features if ordered else features.sort(AVAILABLE, EVENT, CREATED, SEQ)
    if not cutoff:
        rows = rows.sort(EVENT, maintain_order=True)
    rows = rows.with_columns((AVAILABLE if cutoff else pl.col(EVENT)).alias(_V)).with_row_index(_ROW)
    standing = _unbeaten(rows, keys) if cutoff else rows
    asked = entities.select(*keys, pl.col(EVENT).alias(_T)).with_row_index(_POSITION).sort(_T)
    ends = [DELETED] if DELETED in features.columns else []
    found = _as_of(asked, standing, keys=keys, on=_V)
    found = found.hstack(rows.select(EVENT, *ends, *columns)[found[_ROW]])
    found = found.with_columns((~_counts(ends, ttl)).alias(_NONE))
    hidden = _hidden(found.filter(_NONE), rows, keys=keys, ends=ends, ttl=ttl) if cutoff else 0
    answers = found.with_columns(pl.when(~pl.col(_NONE)).then(pl.col(name)).alias(name) for name in columns)
    answers = answers.sort(_POSITION)
    return Answers(columns=answers.select(columns), hidden=hidden, absent=answers[_NONE])


def latest(
    features: pl.DataFrame, *, keys: Sequence[str], as_of: datetime, tombstones: bool = False
) -> pl.DataFrame:
    """The row of each entity that counts at one moment, by the same order; time-to-live is left to the reader.

    Args:
        features: as of `answer`.
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


def _unbeaten(rows: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """The rows that are the greatest so far when they come.

    A row with a greater event that is available no later proves that this one's creation was after its event: where no
    creation was, all rows stay.
    """
    if not rows.select(_LATE.any()).item():
        return rows
    return rows.select(*keys, _V, _ROW, EVENT).filter(
        pl.col(EVENT) >= pl.col(EVENT).cum_max().over(list(keys))
    )


def _as_of(asked: pl.DataFrame, rows: pl.DataFrame, *, keys: Sequence[str], on: str) -> pl.DataFrame:
    """The number of the last row at or before each entity row's time; null where there is none."""
    # Both sides are sorted on the whole, so on every key too.
    return asked.join_asof(
        rows.select(*keys, on, _ROW), left_on=_T, right_on=on, by=list(keys), check_sortedness=False
    )


def _counts(ends: Sequence[str], ttl: timedelta | None) -> pl.Expr:
    """Whether the row that was found is an answer: there is one, not expired, and no tombstone."""
    fresh = pl.col(EVENT).is_not_null() if ttl is None else pl.col(EVENT) >= pl.col(_T) - ttl
    return pl.all_horizontal(fresh, *(~pl.col(name) for name in ends)).fill_null(False)


def _hidden(
    without: pl.DataFrame,
    rows: pl.DataFrame,
    *,
    keys: Sequence[str],
    ends: Sequence[str],
    ttl: timedelta | None,
) -> int:
    """How many of the entity rows without an answer would have one without the cutoff.

    Without it, the answer is the greater one of what was found and the greatest row whose creation was after its event,
    because every row that the cutoff hides is of that kind.
    """
    late = (
        rows.lazy()
        .filter(_LATE)
        .select(*keys, EVENT, _ROW)
        .join(without.lazy().select(keys), on=list(keys), how="semi", maintain_order="left")
        .sort(EVENT, maintain_order=True)
        .collect()
    )
    if late.is_empty():
        return 0
    known = without.select(*keys, _T, pl.col(EVENT).alias("__event"), pl.col(_ROW).alias("__found"))
    found = _as_of(known, late, keys=keys, on=EVENT)
    found = found.drop(EVENT, strict=False).hstack(rows.select(EVENT, *ends)[found[_ROW]])
    newer = pl.any_horizontal(
        pl.col("__event").is_null(),
        pl.col(EVENT) > pl.col("__event"),
        (pl.col(EVENT) == pl.col("__event")) & (pl.col(_ROW) > pl.col("__found")),
    )
    return found.filter(newer.fill_null(False) & _counts(ends, ttl)).height
