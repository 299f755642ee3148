"""Pushed and streamed rows into the online store: of most views as they are, of an aggregated one into the states.

A state is read, given the events and written where nobody wrote in between, else once more (`OnlineStore.update`). Its
rank grows with every write, and a version of an event is known by its number, so events may come again and in any
order. A materialisation takes over from the states of before the versions that its table does not have.

A state that lacks events answers nothing until the view is materialised: of a view that never was, or that was
materialised with other aggregations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from feature_jobs.store.aggregation.tiles import NEVER, EventRow, Tiling, WindowState
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.online.changes import Change, Merge
from feature_jobs.store.online.frames import online_rows
from feature_jobs.store.online.rows import Horizon, OnlineRow
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.online.windows import stored_view


def put_online(store: OnlineStore, view: ViewSpec, key_types: Mapping[str, str], known: pl.DataFrame) -> None:
    """Rows under the numbers that they have.

    Args:
        store: where to.
        view: whose; its join keys and stored columns are columns, and those that are not are null.
        key_types: of its join keys.
        known: those, `event_timestamp`, `created_timestamp`, `ingest_seq`, and `deleted` where there may be tombstones.

    Raises:
        KeyNotFound, KeyRevoked, AccessDenied, OnlineStoreUnavailable: as `OnlineStore.put` does.
    """
    if view.windows is None:
        store.put(view, key_types, list(online_rows(view, known)))
    else:
        _update(store, view, view.windows, key_types, known, itertools.repeat(None))


def settle_online(
    store: OnlineStore,
    view: ViewSpec,
    key_types: Mapping[str, str],
    known: pl.DataFrame,
    numbers: Sequence[int],
) -> None:
    """Give rows that were put under provisional numbers the `ingest_seq` that they got, and put those that were not.

    Args:
        store, view, key_types, known: as of `put_online`, with the provisional numbers.
        numbers: the final ones.
    """
    if view.windows is not None:
        _update(store, view, view.windows, key_types, known, numbers)
        return
    rows = list(online_rows(view, known))
    store.put(view, key_types, [replace(row, seq=seq) for row, seq in zip(rows, numbers, strict=True)])
    store.settle(view, key_types, list(zip(rows, numbers, strict=True)))


def merge_of(view: ViewSpec) -> Merge | None:
    """How a materialisation takes over what is beyond its horizon; none where rows of a view are taken as they are."""
    return None if view.windows is None else _Merger(Tiling(view.windows)).merged


@dataclass(frozen=True, slots=True)
class _Event:
    row: EventRow
    final: int | None
    """The number that it has from now on; none for the one in the row."""


@dataclass(frozen=True, slots=True)
class _Taken:
    """Takes events into one entity's state."""

    tiling: Tiling
    events: Sequence[_Event]

    def made(self, before: OnlineRow | None, whole: bool) -> OnlineRow | None:
        state = _state(self.tiling, before, whole=whole)
        changed = False
        for event in self.events:
            if event.final is None:
                changed |= state.apply(event.row)
            else:
                changed |= state.apply(replace(event.row, seq=event.final), was=event.row.seq)
        if not changed:
            return None
        if state.since_us < NEVER:
            state.expire(state.newest_us - self.tiling.longest_us)
        return _next(before, state, max(event.row.seq for event in self.events))


@dataclass(frozen=True, slots=True)
class _Merger:
    tiling: Tiling

    def merged(self, staged: OnlineRow | None, before: OnlineRow, horizon: Horizon) -> OnlineRow | None:
        """The materialised state with the versions from beyond the horizon."""
        packed = _packed(before)
        if packed is None:
            # Made for other aggregations: what it knew cannot be read, only that something is missing.
            if horizon.covers(before.seq):
                return None
            return _next(staged, WindowState(self.tiling, since_us=NEVER), before.seq)
        old = WindowState.unpack(self.tiling, packed)
        beyond = [row for row in old.rows() if not horizon.covers(row.seq)]
        state = _state(self.tiling, staged, whole=True)
        changed = [state.apply(row) for row in beyond]
        if not any(changed):
            return None
        if old.since_us < NEVER:
            state.since_us = max(state.since_us, old.since_us)
        return _next(staged, state, max(row.seq for row in beyond))


def _update(
    store: OnlineStore,
    view: ViewSpec,
    windows: WindowSpec,
    key_types: Mapping[str, str],
    known: pl.DataFrame,
    finals: Iterable[int | None],
) -> None:
    tiling, by_entity = Tiling(windows), dict[tuple[int | str, ...], list[_Event]]()
    for (keys, row), final in zip(_events(view, windows, known), finals, strict=False):
        # One without an id is from before the view was aggregated.
        if row.event_id is not None:
            by_entity.setdefault(keys, []).append(_Event(row, final))
    changes = [Change(keys, _Taken(tiling, events).made) for keys, events in by_entity.items()]
    store.update(stored_view(view), key_types, changes)


def _events(
    view: ViewSpec, windows: WindowSpec, known: pl.DataFrame
) -> Iterator[tuple[tuple[int | str, ...], EventRow]]:
    """Rows of the table as states take them; a tombstone needs no more than its id."""
    fields = {field.name: field for field in view.stored}
    wanted = replace(view, fields=[fields[windows.event_id], *(fields[name] for name in windows.columns)])
    frame = known.with_columns(pl.lit(False).alias("deleted")) if "deleted" in known.columns else known
    gone = known["deleted"].fill_null(False) if "deleted" in known.columns else itertools.repeat(False)
    for row, deleted in zip(online_rows(wanted, frame), gone, strict=False):
        event_id, *values = row.values
        yield (
            row.keys,
            EventRow(event_id, row.event_us, row.created_us, row.seq, None if deleted else tuple(values)),
        )


def _state(tiling: Tiling, row: OnlineRow | None, *, whole: bool) -> WindowState:
    """What a row holds; an entity without one has no events, if all is known of it."""
    if row is None:
        return WindowState(tiling) if whole else WindowState(tiling, since_us=NEVER)
    packed = _packed(row)
    return WindowState(tiling, since_us=NEVER) if packed is None else WindowState.unpack(tiling, packed)


def _packed(row: OnlineRow) -> bytes | None:
    """A row's state; none where it was written for other aggregations, or for none."""
    packed: bytes | None = row.values[0] if row.values else None
    return packed


def _next(before: OnlineRow | None, state: WindowState, seq: int) -> OnlineRow:
    """A state as the next row: its event time counts writes, so no rank comes twice; its number is the greatest put."""
    writes, number = (0, seq) if before is None else (before.event_us + 1, max(before.seq, seq))
    return OnlineRow(keys=(), event_us=writes, created_us=0, seq=number, values=[state.pack()])
