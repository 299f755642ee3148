"""Aggregated views in the online store: one value per entity, its packed `WindowState`.

Values that were computed at some instant would be wrong at the next one, because windows move. So the state is stored,
sealed by the most sensitive class among the columns it is made of, and read at the request's own `as_of`.

A materialisation answers for instants from one longest window before its own: for earlier ones the state is newer. An
entity that the store does not hold, in a view that was materialised, has no events: its counts are 0, as offline. In
one that was only pushed to, all is missing. `online_events` takes events into the states.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import polars as pl

from feature_jobs.store.aggregation.tiles import NEVER, EventRow, Tiling, WindowState
from feature_jobs.store.catalog.specifications import FieldSpec, ViewSpec
from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.definitions.limits import before
from feature_jobs.store.definitions.views import Sensitivity, content_hash
from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.online.frames import plain_columns
from feature_jobs.store.online.rows import Found, OnlineRow
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

_ASCENDING = list(Sensitivity)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def stored_view(view: ViewSpec) -> ViewSpec:
    """The view as the online store holds it; another view unchanged.

    The state's dtype names the aggregations it was made for: one made for others is not read.
    """
    if view.windows is None:
        return view
    used = [field.sensitivity for field in view.stored if field.name in view.windows.read]
    state = FieldSpec(
        name="state",
        dtype=f"windows-{content_hash(asdict(view.windows))}",
        sensitivity=max(used, key=lambda name: _ASCENDING.index(Sensitivity(name))),
        categorical=False,
    )
    return replace(view, fields=[state], windows=None, event_fields=())


class WindowedView:
    """Reads the states of one view."""

    def __init__(self, view: ViewSpec, windows: WindowSpec) -> None:
        self.stored = stored_view(view)
        self._tiling = Tiling(windows)

    def found(
        self, keys: Sequence[object | None], states: Sequence[Found | None], at_us: int
    ) -> list[Found | None]:
        """What the view's features are at an instant; none where nobody is asked for, or nothing can be said.

        A state that begins later has its time and no values.

        Raises:
            InvalidRequest: a sum of whole numbers is beyond int64.
        """
        return [
            None if key is None else self._answer(state, at_us)
            for key, state in zip(keys, states, strict=True)
        ]

    def _answer(self, found: Found | None, at_us: int) -> Found | None:
        if found is None:
            state = WindowState(self._tiling)
        elif (packed := found[3][0]) is not None:
            state = WindowState.unpack(self._tiling, packed)
        else:
            return None
        values = state.values(at_us)
        if values is not None:
            return at_us, at_us, None not in values, values
        # A state that lacks events says nothing at all; any other one begins later than this instant.
        return None if state.since_us >= NEVER else (state.since_us, state.since_us, False, ())


def state_rows(pinned: Snapshot, windows: WindowSpec, as_of: dt.datetime) -> Iterator[OnlineRow]:
    """The state of every entity with what was known at a moment, bucket by bucket."""
    for bucket in range(pinned.num_buckets):
        events = pinned.read(bucket, windows.read)
        if not events.is_empty():
            yield from states(events, list(pinned.key_types), windows, as_of)


def states(
    events: pl.DataFrame, keys: Sequence[str], windows: WindowSpec, as_of: dt.datetime
) -> Iterator[OnlineRow]:
    """The state of every entity that has events, with what was known at a moment.

    Args:
        events: as of `windows.aggregate`.
        keys: columns that identify an entity.
        windows: the view's.
        as_of: the moment.
    """
    tiling = Tiling(windows)
    since = before(as_of, dt.timedelta(microseconds=tiling.longest_us))
    since_us = (since - _EPOCH) // dt.timedelta(microseconds=1)
    known = events.filter(as_of >= AVAILABLE)
    useful = _useful(known, keys, windows, since)
    for entity, rows in itertools.groupby(useful.iter_rows(), key=lambda row: row[: len(keys)]):
        state = WindowState(tiling, since_us=since_us)
        for row in rows:
            event_us, created_us, seq, deleted, event_id, *values = row[len(keys) :]
            state.apply(EventRow(event_id, event_us, created_us, seq, None if deleted else tuple(values)))
        yield _row(entity, state, seq)
    # Of the others it must be known that something was before, or it would be said that nothing was.
    others = known.join(useful, on=list(keys), how="anti").group_by(keys).agg(pl.col(SEQ).max())
    for *entity, seq in others.iter_rows():
        yield _row(tuple(entity), WindowState(tiling, since_us=since_us), seq)


def _row(entity: tuple[int | str, ...], state: WindowState, seq: int) -> OnlineRow:
    since_us = state.since_us
    return OnlineRow(keys=entity, event_us=since_us, created_us=since_us, seq=seq, values=[state.pack()])


def _useful(
    known: pl.DataFrame, keys: Sequence[str], windows: WindowSpec, since: dt.datetime
) -> pl.DataFrame:
    """The rows that the states need, entity by entity and by sequence."""
    longest = dt.timedelta(microseconds=windows.longest_us)
    # An event is needed whole or not at all: without its correction, the version before would count again.
    newest = AVAILABLE.max().over([*keys, windows.event_id])
    deleted = pl.col(DELETED) if DELETED in known.columns else pl.lit(False)
    times = plain_columns(windows.columns)
    columns = [pl.col(name).alias(f"__value_{name}") for name in windows.columns]
    return (
        known.filter(newest > before(since, longest))
        .sort(*keys, SEQ)
        .with_columns(*times)
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
