"""The online state of windowed aggregations equals the offline result, for any order and repetition of events."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest
from feature_jobs.store.aggregation.tiles import EventRow, Tiling, WindowState
from feature_jobs.store.definitions.aggregations import EXACT_DISTINCT, WindowSpec
from feature_jobs.store.offline.window_values import aggregate
from feature_jobs.store.types.schema import PROVISIONAL
from tests.unit.feature_jobs.aggregation.event_frames import (
    EVENTS,
    KEYS,
    SPEC,
    START,
    TIME,
    event_frames,
    window_of,
)

HOUR_US = 3_600_000_000
START_US = int(START.timestamp()) * 1_000_000
TILING = Tiling(SPEC)


def event_rows(frame: pl.DataFrame, spec: WindowSpec = SPEC) -> list[EventRow]:
    """Convert a frame's rows to `EventRow`."""
    times = [pl.col(name).dt.epoch("us") for name, dtype in frame.schema.items() if dtype == TIME]
    return [
        EventRow(
            row["event_id"],
            row["event_timestamp"],
            row["created_timestamp"],
            row["ingest_seq"],
            None if row["deleted"] else tuple(row[name] for name in spec.columns),
        )
        for row in frame.with_columns(*times).iter_rows(named=True)
    ]


def offline_values(frame: pl.DataFrame, *instants_us: int, spec: WindowSpec = SPEC) -> list[list[Any]]:
    """Return the values that a training set would have."""
    entity_rows = [(1, "n", START + timedelta(microseconds=at_us - START_US)) for at_us in instants_us]
    entities = pl.DataFrame(entity_rows, schema=KEYS | {"event_timestamp": TIME}, orient="row")
    answers = aggregate(entities, frame, keys=list(KEYS), windows=spec).columns
    times = [pl.col(name).dt.epoch("us") for name, dtype in answers.schema.items() if dtype == TIME]
    return [list(row) for row in answers.with_columns(*times).rows()]


one_entity = event_frames().map(
    lambda frame: frame.with_columns(person=pl.lit(1, pl.Int64), place=pl.lit("n"))
)


@settings(max_examples=settings.default.max_examples, deadline=None)
@given(frame=one_entity, data=st.data())
def test_state_agrees_with_offline_for_every_instant(frame: pl.DataFrame, data: st.DataObject) -> None:
    """For any order, with repetitions, with packing in between, and for instants before the last version was known."""
    rows = event_rows(frame)
    state = WindowState(TILING)
    for row in data.draw(st.permutations(rows + rows[::2])):
        state.apply(row)
        if data.draw(st.integers(0, 3)) == 0:
            state = WindowState.unpack(TILING, state.pack())
    for row in rows:
        assert not state.apply(row)
    instants = [START_US + hour * HOUR_US for hour in range(18)]
    assert [state.values(at_us) for at_us in instants] == offline_values(frame, *instants)


@settings(max_examples=settings.default.max_examples, deadline=None)
@given(frame=one_entity, data=st.data())
def test_expiry_and_replay_change_no_later_answer(frame: pl.DataFrame, data: st.DataObject) -> None:
    """Events come in the order of their created time. The state expires, and a crash replays some of the events."""
    frame = frame.sort("created_timestamp")
    rows = event_rows(frame)
    state, at_us = WindowState(TILING), START_US
    for position, row in enumerate(rows):
        at_us = row.created_us
        num_replayed = data.draw(st.integers(0, 3))
        for replayed in [*rows[max(position - num_replayed, 0) : position], row]:
            state.apply(replayed)
        if data.draw(st.booleans()):
            state.expire(at_us)
    instants = [at_us + hour * HOUR_US for hour in range(4)]
    online = []
    for at_us in instants:
        online.append(state.values(at_us))
        state.expire(at_us)
    assert online == offline_values(frame, *instants)


def row(event: str, at: float, value: Any, *, seq: int = 0, created: float | None = None) -> EventRow:
    """Build a version of an event at an hour. Without a value it is a tombstone."""
    times = (START_US + int(hour * HOUR_US) for hour in (at, at if created is None else created))
    return EventRow(event, *times, seq, None if value is None else (value,))


def at(hour: float) -> int:
    """Return an hour after the start, in microseconds."""
    return START_US + int(hour * HOUR_US)


def test_old_events_are_dropped_and_earlier_instants_have_no_values() -> None:
    """So the state's size depends only on the longest window."""
    state = WindowState(Tiling(window_of(("amount", "count"))))
    for number in range(2000):
        state.apply(row(str(number), number / 10, 1.0, seq=number))
        state.expire(at(number / 10))
    assert state.values(at(199.9)) == [50]
    assert state.values(at(199.8)) is None
    assert len(state.pack()) < 10_000


def test_repeated_old_version_does_not_undo_a_correction() -> None:
    """This is true even if the correction moved the event to a time for which all other events were dropped."""
    state = WindowState(Tiling(window_of(("amount", "count"))))
    state.apply(row("a", 20, 1.0))
    state.apply(row("a", 1, 1.0, seq=1, created=20.5))
    state.expire(at(21))
    state.apply(row("a", 20, 1.0))
    assert state.values(at(21)) == [0]


def test_pushed_version_gets_its_final_order_with_its_final_number() -> None:
    """Before that it counts as the last version. Versions that may be later are kept, also through expiry."""
    state = WindowState(Tiling(window_of(("amount", "sum"), ("amount", "last"))))
    pushed = row("a", 1, 7.0, seq=PROVISIONAL + 4)
    state.apply(row("a", 1, 5.0, seq=10))
    state.apply(pushed)
    state.apply(row("a", 1, 8.0, seq=12))
    state.apply(row("b", 1, 1.0, seq=13))
    state.expire(at(1))
    assert state.values(at(1)) == [8.0, 7.0]
    assert state.apply(replace(pushed, seq=11), was=pushed.seq)
    assert state.values(at(1)) == [9.0, 1.0]
    assert not state.apply(replace(pushed, seq=11), was=pushed.seq)
    assert sorted(version.seq for version in state.rows()) == [12, 13]


def test_event_dated_ahead_counts_from_its_event_time() -> None:
    """Until then, the version that it corrects counts."""
    state = WindowState(Tiling(window_of(("amount", "sum"))))
    state.apply(row("a", 1, 5.0))
    state.apply(row("a", 3, 7.0, seq=1, created=2))
    assert [state.values(at(hour)) for hour in (2.5, 3)] == [[5.0], [7.0]]


@pytest.mark.parametrize("num_values", [EXACT_DISTINCT - 10, EXACT_DISTINCT, EXACT_DISTINCT + 1, 3000])
def test_distinct_agrees_with_offline_below_and_above_its_bound(num_values: int) -> None:
    """This includes one tile with all values, and a window that begins within a tile."""
    spec = window_of(("size", "distinct"))
    state = WindowState(Tiling(spec))
    hours = [10 * number / num_values for number in range(num_values)]
    data = [
        dict.fromkeys(EVENTS)
        | {"person": 1, "place": "n", "event_id": str(number), "ingest_seq": number, "deleted": False}
        | {"size": number % num_values}
        | dict.fromkeys(("event_timestamp", "created_timestamp"), START + timedelta(hours=hour / 2))
        for number, hour in enumerate(hours)
    ]
    frame = pl.DataFrame(data, schema=EVENTS)
    for event_row in event_rows(frame, spec):
        state.apply(event_row)
    instants = [at(hour) for hour in (3.0, 4.999, 5.3, 7.0)]
    assert [state.values(at_us) for at_us in instants] == offline_values(frame, *instants, spec=spec)


def test_sum_outside_int64_is_refused_while_it_counts() -> None:
    """When its events leave the window, reads work again."""
    tiling = Tiling(window_of(("size", "sum")))
    state = WindowState(tiling)
    for number in range(3):
        state.apply(row(str(number), 1, 2**62, seq=number))
    state.apply(row("later", 4, 1, seq=9))
    state = WindowState.unpack(tiling, state.pack())
    with pytest.raises(InvalidRequest, match="outside int64"):
        state.values(at(4))
    assert state.values(at(7)) == [1]
