"""Compute the states of aggregated views (`window_states.py`) from the events of their tables."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterator, Sequence

import polars as pl

from feature_jobs.store.aggregation.tiles import EventRow, Tiling, WindowState
from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.definitions.limits import subtract_span
from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.online.frames import plain_columns
from feature_jobs.store.online.reader import epoch_microseconds
from feature_jobs.store.online.rows import OnlineRow
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ


def state_rows(pinned: Snapshot, windows: WindowSpec, as_of: dt.datetime) -> Iterator[OnlineRow]:
    """Yield the state of every entity with the events that were known at `as_of`, bucket by bucket."""
    for bucket in range(pinned.num_buckets):
        events = pinned.read(bucket, windows.table_columns)
        if not events.is_empty():
            yield from entity_states(events, list(pinned.key_types), windows, as_of)


def entity_states(
    events: pl.DataFrame, keys: Sequence[str], windows: WindowSpec, as_of: dt.datetime
) -> Iterator[OnlineRow]:
    """Yield the state of every entity that has events, with the events that were known at `as_of`.

    Args:
        events: as in `offline.window_values.aggregate`.
        keys: join keys.
        windows: the view's aggregations.
        as_of: the time of the states.
    """
    tiling = Tiling(windows)
    since = subtract_span(as_of, dt.timedelta(microseconds=tiling.longest_us))
    since_us = epoch_microseconds(since)
    known = events.filter(as_of >= AVAILABLE)
    useful = _useful(known, keys, windows, since)
    for entity, rows in itertools.groupby(useful.iter_rows(), key=lambda row: row[: len(keys)]):
        state = WindowState(tiling, since_us=since_us)
        for row in rows:
            event_us, created_us, seq, deleted, event_id, *values = row[len(keys) :]
            state.apply(EventRow(event_id, event_us, created_us, seq, None if deleted else tuple(values)))
        yield _row(entity, state, seq)
    # The other entities have only older events. Their empty state makes a read before `since` return `newer`.
    # Without a row, such a read would return the values of an entity that never had events.
    others = known.join(useful, on=list(keys), how="anti").group_by(keys).agg(pl.col(SEQ).max())
    for *entity, seq in others.iter_rows():
        yield _row(tuple(entity), WindowState(tiling, since_us=since_us), seq)


def _row(entity: tuple[int | str, ...], state: WindowState, seq: int) -> OnlineRow:
    since_us = state.since_us
    return OnlineRow(keys=entity, event_us=since_us, created_us=since_us, seq=seq, values=[state.pack()])


def _useful(
    known: pl.DataFrame, keys: Sequence[str], windows: WindowSpec, since: dt.datetime
) -> pl.DataFrame:
    """Return the rows that the states need, sorted by entity and sequence number."""
    longest = dt.timedelta(microseconds=windows.longest_us)
    # Take all versions of an event or none. Without a correction, the corrected version would be used again.
    newest = AVAILABLE.max().over([*keys, windows.event_id])
    deleted = pl.col(DELETED) if DELETED in known.columns else pl.lit(False)
    plain = plain_columns(windows.columns)
    columns = [pl.col(name).alias(f"__value_{name}") for name in windows.columns]
    return (
        known.filter(newest > subtract_span(since, longest))
        .sort(*keys, SEQ)
        .with_columns(*plain)
        .select(
            *keys,
            pl.col(EVENT).dt.epoch("us"),
            pl.col(CREATED).dt.epoch("us"),
            SEQ,
            deleted.alias(DELETED),
            pl.col(windows.event_id).alias("__event_id"),
            *columns,
        )
    )
