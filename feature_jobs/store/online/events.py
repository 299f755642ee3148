"""Write pushed and streamed rows to the online store. Rows of an aggregated view are added to the entities' states.

For an aggregated view, a state is read, the events are added, and the state is written if no other writer has changed
it in between. Otherwise these steps are repeated (`OnlineStore.update`). The rank of a state grows with every write. A
version of an event is identified by its sequence number, so events may come repeatedly and in any order. From the
previous states, a materialisation also copies the event versions that its table version lacks.

A state that lacks events returns no values until the view is materialised. That is the case for a view that never was
materialised, or was materialised with other aggregations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from feature_jobs.store.aggregation.tiles import NO_INSTANT, EventRow, Tiling, WindowState
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.online.changes import Change, Merge
from feature_jobs.store.online.frames import online_rows
from feature_jobs.store.online.rows import Horizon, OnlineRow
from feature_jobs.store.online.store import OnlineStore
from feature_jobs.store.online.window_states import stored_view
from feature_jobs.store.types.schema import DELETED


def put_online(store: OnlineStore, view: ViewSpec, key_types: Mapping[str, str], known: pl.DataFrame) -> None:
    """Write rows to the online store under their `ingest_seq` or provisional number.

    Args:
        store: the online store.
        view: the view of the rows.
        key_types: types of the view's join keys.
        known: the view's join keys and stored columns, `event_timestamp`, `created_timestamp`, `ingest_seq`, and
            `deleted` if there may be tombstones. A stored column that is missing is null.

    Raises:
        KeyNotFound, KeyRevoked, AccessDenied, OnlineStoreUnavailable: see `OnlineStore.put`.
    """
    if view.windows is None:
        store.put(view, key_types, list(online_rows(view, known)))
    else:
        _update(store, view, view.windows, key_types, known, itertools.repeat(None))


def assign_sequence_online(
    store: OnlineStore,
    view: ViewSpec,
    key_types: Mapping[str, str],
    known: pl.DataFrame,
    numbers: Sequence[int],
) -> None:
    """Replace the provisional numbers of online rows by their `ingest_seq`, and write the rows that are not stored yet.

    Args:
        store, view, key_types, known: as in `put_online`; `known` has the provisional numbers.
        numbers: the `ingest_seq` of each row.
    """
    if view.windows is not None:
        _update(store, view, view.windows, key_types, known, numbers)
        return
    rows = list(online_rows(view, known))
    store.put(view, key_types, [replace(row, seq=seq) for row, seq in zip(rows, numbers, strict=True)])
    store.assign_sequence(view, key_types, list(zip(rows, numbers, strict=True)))


def merge_function(view: ViewSpec) -> Merge | None:
    """Return the function that merges two states of an entity; None for a view that is not aggregated."""
    return None if view.windows is None else _Merger(Tiling(view.windows)).merge


@dataclass(frozen=True, slots=True)
class _Event:
    row: EventRow
    final_seq: int | None
    """The `ingest_seq` that replaces the row's provisional number; None to keep the row's number."""


@dataclass(frozen=True, slots=True)
class _EventUpdate:
    """Adds events to one entity's state."""

    tiling: Tiling
    events: Sequence[_Event]

    def make(self, old_row: OnlineRow | None, materialised: bool) -> OnlineRow | None:
        state = _state_of(self.tiling, old_row, materialised=materialised)
        changed = False
        for event in self.events:
            if event.final_seq is None:
                changed |= state.apply(event.row)
            else:
                changed |= state.apply(replace(event.row, seq=event.final_seq), was=event.row.seq)
        if not changed:
            return None
        if state.since_us < NO_INSTANT:
            state.expire(state.newest_us - self.tiling.longest_us)
        return _next_row(old_row, state, max(event.row.seq for event in self.events))


@dataclass(frozen=True, slots=True)
class _Merger:
    """Merges a previous state into the materialised one."""

    tiling: Tiling

    def merge(self, staged: OnlineRow | None, previous: OnlineRow, horizon: Horizon) -> OnlineRow | None:
        """Add the event versions beyond the horizon to the materialised state."""
        packed = _packed_state(previous)
        if packed is None:
            # The state is for other aggregations and cannot be read. If it has events beyond the horizon, the new
            # state lacks them.
            if horizon.covers(previous.seq):
                return None
            return _next_row(staged, WindowState(self.tiling, since_us=NO_INSTANT), previous.seq)
        old = WindowState.unpack(self.tiling, packed)
        beyond = [row for row in old.rows() if not horizon.covers(row.seq)]
        state = _state_of(self.tiling, staged, materialised=True)
        changed = [state.apply(row) for row in beyond]
        if not any(changed):
            return None
        if old.since_us < NO_INSTANT:
            state.since_us = max(state.since_us, old.since_us)
        return _next_row(staged, state, max(row.seq for row in beyond))


def _update(
    store: OnlineStore,
    view: ViewSpec,
    windows: WindowSpec,
    key_types: Mapping[str, str],
    known: pl.DataFrame,
    final_seqs: Iterable[int | None],
) -> None:
    """Add rows to the states of their entities, under their final numbers if these are given."""
    tiling, by_entity = Tiling(windows), dict[tuple[int | str, ...], list[_Event]]()
    for (keys, row), final_seq in zip(_events(view, windows, known), final_seqs, strict=False):
        # A row without an event id was stored before the view was aggregated.
        if row.event_id is not None:
            by_entity.setdefault(keys, []).append(_Event(row, final_seq))
    changes = [Change(keys, _EventUpdate(tiling, events).make) for keys, events in by_entity.items()]
    store.update(stored_view(view), key_types, changes)


def _events(
    view: ViewSpec, windows: WindowSpec, known: pl.DataFrame
) -> Iterator[tuple[tuple[int | str, ...], EventRow]]:
    """Yield the join keys and the event of each table row. A tombstone has only an event id."""
    fields = {field.name: field for field in view.stored}
    event_view = replace(view, fields=[fields[windows.event_id], *(fields[name] for name in windows.columns)])
    # `online_rows` drops the values of deleted rows, and so the event id. So it must not get `deleted`.
    has_deleted = DELETED in known.columns
    frame = known.with_columns(pl.lit(False).alias(DELETED)) if has_deleted else known
    is_deleted = known[DELETED].fill_null(False) if has_deleted else itertools.repeat(False)
    for row, deleted in zip(online_rows(event_view, frame), is_deleted, strict=False):
        event_id, *values = row.values
        yield (
            row.keys,
            EventRow(event_id, row.event_us, row.created_us, row.seq, None if deleted else tuple(values)),
        )


def _state_of(tiling: Tiling, row: OnlineRow | None, *, materialised: bool) -> WindowState:
    """Return the state in a row. An entity without a row has no events if the view was materialised."""
    if row is None:
        return WindowState(tiling) if materialised else WindowState(tiling, since_us=NO_INSTANT)
    packed = _packed_state(row)
    return WindowState(tiling, since_us=NO_INSTANT) if packed is None else WindowState.unpack(tiling, packed)


def _packed_state(row: OnlineRow) -> bytes | None:
    """Return a row's packed state; None if the row was written for other aggregations or without any."""
    packed: bytes | None = row.values[0] if row.values else None
    return packed


def _next_row(old_row: OnlineRow | None, state: WindowState, seq: int) -> OnlineRow:
    """Return a state as the row that replaces `old_row`.

    The row's event time is the number of writes, so that every rank is unique. Its sequence number is the greatest one
    of the written events.
    """
    writes, number = (0, seq) if old_row is None else (old_row.event_us + 1, max(old_row.seq, seq))
    return OnlineRow(keys=(), event_us=writes, created_us=0, seq=number, values=[state.pack()])
