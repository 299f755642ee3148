"""Aggregated views in the online store: one value for each entity, its packed `WindowState`.

Windows move, so values that are computed at one instant are wrong at the next instant. Therefore the state is stored,
and the values are computed at the `as_of` of each read. The state is encrypted under the most sensitive class of the
columns that it is made of.

After a materialisation, a state can be read at any instant that is not before the materialisation's `as_of` minus the
longest window. At an earlier instant the status is `newer`. In a view that was materialised, an entity without a row
has no events, so its counts are 0, as offline. In a view with only pushed rows, the entity's values are missing.
`events.py` adds events to the states.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import polars as pl

from feature_jobs.store.aggregation.tiles import NO_INSTANT, EventRow, Tiling, WindowState
from feature_jobs.store.catalog.specifications import FieldSpec, ViewSpec
from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.definitions.limits import subtract_span
from feature_jobs.store.definitions.views import Sensitivity, content_hash
from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.online.frames import plain_columns
from feature_jobs.store.online.rows import FoundRow, OnlineRow
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

_ASCENDING = list(Sensitivity)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def stored_view(view: ViewSpec) -> ViewSpec:
    """Return an aggregated view as it is stored online: with the state as its only field. Other views do not change.

    The state's dtype has a hash of the aggregations, so a state for other aggregations is not read.
    """
    if view.windows is None:
        return view
    sensitivities = [field.sensitivity for field in view.stored if field.name in view.windows.table_columns]
    state = FieldSpec(
        name="state",
        dtype=f"windows-{content_hash(asdict(view.windows))}",
        sensitivity=max(sensitivities, key=lambda name: _ASCENDING.index(Sensitivity(name))),
        categorical=False,
    )
    return replace(view, fields=[state], windows=None, event_fields=())


class WindowedView:
    """Reads the states of one view."""

    def __init__(self, view: ViewSpec, windows: WindowSpec) -> None:
        self.stored = stored_view(view)
        self._tiling = Tiling(windows)

    def rows_at(
        self, keys: Sequence[object | None], states: Sequence[FoundRow | None], at_us: int
    ) -> list[FoundRow | None]:
        """Return rows with the view's features at an instant; None without a key, or if the state lacks events.

        If the state begins after the instant, the row has the state's time and no values.

        Raises:
            InvalidRequest: a sum of whole numbers is beyond int64.
        """
        return [
            None if key is None else self._row_at(state, at_us)
            for key, state in zip(keys, states, strict=True)
        ]

    def _row_at(self, state_row: FoundRow | None, at_us: int) -> FoundRow | None:
        if state_row is None:
            state = WindowState(self._tiling)
        else:
            _, _, _, (packed,) = state_row
            if packed is None:
                return None
            state = WindowState.unpack(self._tiling, packed)
        values = state.values(at_us)
        if values is not None:
            return at_us, at_us, None not in values, values
        # There are no values because the state lacks events, or because it begins after this instant.
        return None if state.since_us >= NO_INSTANT else (state.since_us, state.since_us, False, ())


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
    since_us = (since - _EPOCH) // dt.timedelta(microseconds=1)
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
