"""Windowed aggregations offline, compared with DuckDB as an independent oracle, and known difficult cases."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import TrainingSetError
from feature_jobs.store.aggregation.hyperloglog import estimate, registers_of
from feature_jobs.store.definitions.aggregations import (
    ALL_EVENTS,
    EXACT_DISTINCT,
    WindowSpec,
)
from feature_jobs.store.offline import window_values as offline
from feature_jobs.store.offline.past_retention import corrected_by_old
from feature_jobs.store.offline.window_values import aggregate
from tests.unit.feature_jobs.aggregation.event_frames import (
    COLUMNS,
    EVENTS,
    KEYS,
    SPEC,
    START,
    TIME,
    WINDOWS_H,
    entity_frames,
    event_frames,
    window_of,
)

# The definition itself: what was known, its latest version of each event, no tombstones, then the window.
ORACLE = """
WITH known AS (
    SELECT e.position, e.event_timestamp AS asked, f.* EXCLUDE (person, place)
    FROM entities AS e JOIN events AS f ON f.person = e.person AND f.place = e.place
    WHERE f.event_timestamp <= e.event_timestamp AND (NOT {cutoff} OR f.created_timestamp <= e.event_timestamp)
), counting AS (
    SELECT * FROM known
    QUALIFY row_number() OVER (PARTITION BY position, event_id ORDER BY created_timestamp DESC, ingest_seq DESC) = 1
), live AS (
    SELECT * FROM counting WHERE NOT deleted AND event_timestamp > asked - to_hours({window})
)
SELECT {outputs}
FROM entities AS e LEFT JOIN live USING (position)
GROUP BY e.position, e.person, e.place
ORDER BY e.position
"""
LAST = "last({0} ORDER BY live.event_timestamp, created_timestamp, ingest_seq) FILTER (WHERE {0} IS NOT NULL)"


def expression(column: str, function: str) -> str:
    """Return an output as SQL. An entity with a null key has null values."""
    match function:
        case "last":
            inner = LAST.format(column)
        case "distinct":
            inner = f"count(DISTINCT {column})"
        case "mean":
            inner = f"avg({column})"
        case _:
            inner = f"{function}({'event_id' if column == ALL_EVENTS else column})"
    return f"CASE WHEN e.person IS NOT NULL AND e.place IS NOT NULL THEN {inner} END"


@settings(max_examples=settings.default.max_examples, deadline=None)
@given(events=event_frames(), entities=entity_frames, cutoff=st.booleans())
def test_aggregations_agree_with_the_definition_in_sql(
    oracle: duckdb.DuckDBPyConnection, events: pl.DataFrame, entities: pl.DataFrame, cutoff: bool
) -> None:
    """With late corrections, moved events, tombstones, events at both ends of a window, nulls, and several keys."""
    actual = aggregate(entities, events, keys=list(KEYS), windows=SPEC, cutoff=cutoff).columns
    oracle.register("events", events.to_arrow())
    oracle.register("entities", entities.with_row_index("position").to_arrow())
    for window in WINDOWS_H:
        outputs = [output for output in SPEC.outputs if output.window_us == window * 3_600_000_000]
        text = ", ".join(expression(output.column, output.function) for output in outputs)
        expected = oracle.execute(ORACLE.format(outputs=text, window=window, cutoff=cutoff)).fetchall()
        assert expected == actual.select(output.name for output in outputs).rows()


def moment(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def events(*rows: tuple[str, float, float, Any], **more: Any) -> pl.DataFrame:
    """Build events of one person from (id, event hour, created hour, amount)."""
    defaults = dict.fromkeys(COLUMNS) | {"deleted": False} | more
    data = [
        defaults
        | {"person": 1, "place": "n", "event_id": event, "ingest_seq": seq, "amount": amount}
        | {"event_timestamp": moment(at), "created_timestamp": moment(known)}
        for seq, (event, at, known, amount) in enumerate(rows)
    ]
    return pl.DataFrame(data, schema=EVENTS)


def aggregated(frame: pl.DataFrame, spec: WindowSpec, *hours: float) -> list[tuple[Any, ...]]:
    """Return the aggregations at some hours."""
    data = [(1, "n", moment(hour)) for hour in hours]
    entities = pl.DataFrame(data, schema=KEYS | {"event_timestamp": TIME}, orient="row")
    return aggregate(entities, frame, keys=list(KEYS), windows=spec).columns.rows()


def test_window_excludes_its_start_and_includes_its_end() -> None:
    """(t - w, t]: an event exactly w ago does not count, an event at t counts."""
    frame = events(("a", 1, 1, 2.0))
    actual = aggregated(frame, window_of(("amount", "sum")), 0.5, 1, 5.999, 6)
    assert actual == [(None,), (2.0,), (2.0,), (None,)]


@pytest.mark.parametrize(
    ("versions", "hours", "expected"),
    [
        pytest.param([(1, 1, 2.0), (1, 3, 7.0)], [2, 3], [(2.0, 1), (7.0, 1)], id="correction"),
        pytest.param([(6, 6, 2.0), (1, 7, 2.0)], [6.5, 7], [(2.0, 1), (None, 0)], id="moved back in time"),
        pytest.param(
            [(1, 2, 5.0), (4, 1, 9.0)], [3, 5], [(5.0, 1), (5.0, 1)], id="older version arrives late"
        ),
    ],
)
def test_version_that_was_created_last_counts(
    versions: list[tuple[float, float, float]], hours: list[float], expected: list[tuple[float | None, int]]
) -> None:
    """Two versions of an event never both count, and a correction never counts early."""
    frame = events(*[("a", *version) for version in versions])
    assert aggregated(frame, window_of(("amount", "sum"), (ALL_EVENTS, "count")), *hours) == expected


def test_rows_without_events_because_of_the_cutoff_are_counted() -> None:
    """Rows that have no events even without the cutoff are not counted."""
    frame = events(("a", 1, 4, 2.0), ("b", 3, 4, 2.0))
    entities = pl.DataFrame(
        {"person": 1, "place": "n", "event_timestamp": [moment(hour) for hour in (0, 1, 3, 4, 9)]},
        schema=KEYS | {"event_timestamp": TIME},
    )
    spec = window_of((ALL_EVENTS, "count"))
    assert aggregate(entities, frame, keys=list(KEYS), windows=spec).hidden == 2
    assert aggregate(entities, frame, keys=list(KEYS), windows=spec, cutoff=False).hidden == 0


def test_only_a_null_key_is_absent() -> None:
    """An entity without events has a count of 0, which is a value."""
    entities = pl.DataFrame(
        {"person": [1, None, 9], "place": "n", "event_timestamp": START},
        schema=KEYS | {"event_timestamp": TIME},
    )
    answers = aggregate(
        entities, events(("a", 0, 0, 2.0)), keys=list(KEYS), windows=window_of((ALL_EVENTS, "count"))
    )
    assert answers.absent.to_list() == [False, True, False]
    assert answers.columns.to_series().to_list() == [1, None, 0]


@settings(max_examples=max(settings.default.max_examples // 3, 1), deadline=None)
@given(frame=event_frames(min_size=12), late_h=st.integers(0, 3))
def test_retention_changes_no_later_answer(frame: pl.DataFrame, late_h: int) -> None:
    """If a correction moved an event before the retention, the versions that it corrected are removed too."""
    frame = frame.with_columns(person=pl.lit(1, pl.Int64), place=pl.lit("n"))
    now = START + timedelta(hours=12)
    oldest = now - timedelta(hours=max(WINDOWS_H))
    corrected = corrected_by_old(frame, list(KEYS), "event_id", oldest)
    retained = frame.filter((pl.col("event_timestamp") >= oldest) & ~pl.col("ingest_seq").is_in(corrected))
    spec = window_of((ALL_EVENTS, "count"), ("amount", "sum"))
    assert aggregated(retained, spec, 12 + late_h) == aggregated(frame, spec, 12 + late_h)


def test_tombstone_removes_an_event_from_when_it_was_known() -> None:
    """A later version restores the event."""
    frame = pl.concat([events(("a", 1, 1, 2.0)), events(("a", 1, 2, None), deleted=True)])
    frame = pl.concat([frame, events(("a", 1, 3, 4.0))]).with_columns(pl.Series("ingest_seq", [0, 1, 2]))
    assert aggregated(frame, window_of(("amount", "sum"), (ALL_EVENTS, "count")), 1, 2, 3) == [
        (2.0, 1),
        (None, 0),
        (4.0, 1),
    ]


def test_no_events_give_zero_counts_and_null_values() -> None:
    """For an unknown entity and for an empty table."""
    spec = window_of(*[("amount", name) for name in ("count", "distinct", "sum", "mean", "min", "last")])
    assert aggregated(events(), spec, 1) == [(0, 0, None, None, None, None)]


def test_sums_of_fractions_are_exact_and_rounded_once() -> None:
    """A large payment and its reversal leave the sum of the others exact, unlike running totals of floats."""
    rng = np.random.default_rng(7)
    amounts = [1e15, 0.1, -1e15, 1e-300, 1e300, -1e300, *rng.normal(0, 1e6, 40), *rng.normal(0, 1e-9, 40)]
    frame = events(*[(str(i), i / 10, i / 10, amount) for i, amount in enumerate(amounts)])
    actual = aggregated(
        frame, window_of(("amount", "sum"), ("amount", "mean"), hours=2), *[i / 10 for i in range(86)]
    )
    expected = [math.fsum(amounts[max(i - 19, 0) : i + 1]) for i in range(86)]
    assert [row[0] for row in actual] == expected
    assert [row[1] for row in actual] == [total / min(i + 1, 20) for i, total in enumerate(expected)]


def test_infinite_amounts_affect_only_their_windows() -> None:
    """Infinities of both signs give null."""
    frame = events(("a", 1, 1, math.inf), ("b", 2, 2, -math.inf), ("c", 3, 3, 1.0), ("d", 9, 9, 1.7e308))
    frame = pl.concat([frame, events(("e", 9, 9, 1.7e308))])
    actual = aggregated(frame, window_of(("amount", "sum")), 1, 3, 6, 7, 9)
    assert actual == [(math.inf,), (None,), (-math.inf,), (1.0,), (math.inf,)]


def test_whole_numbers_too_large_for_their_sum_are_refused() -> None:
    """The sum does not wrap around."""
    frame = events(("a", 1, 1, None), ("b", 1, 1, None)).with_columns(size=pl.lit(2**62))
    with pytest.raises(TrainingSetError, match="Declare the column as float64"):
        aggregated(frame, window_of(("size", "sum")), 2)


@pytest.mark.parametrize("places", [1, 7, 256])
def test_distinct_is_exact_up_to_its_bound_and_estimated_above(
    monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    """The number of positions per block does not matter."""
    monkeypatch.setattr(offline, "_ROWS_AT_ONCE", places)
    total = EXACT_DISTINCT + 300
    frame = events(*[(str(i), i / 1000, i / 1000, float(i // 2)) for i in range(2 * total)])
    hours = [(2 * EXACT_DISTINCT - 1) / 1000, 2 * EXACT_DISTINCT / 1000, 2.5, 3.5]
    actual = aggregated(frame, window_of(("amount", "distinct"), hours=2), *hours)

    def values(hour: float) -> set[float]:
        return {float(i // 2) for i in range(2 * total) if hour - 2 < i / 1000 <= hour}

    exact = [len(values(hour)) for hour in hours]
    assert exact[0] <= EXACT_DISTINCT
    assert [row[0] for row in actual] == [
        count if count <= EXACT_DISTINCT else max(estimate(registers_of(values(hour))), EXACT_DISTINCT + 1)
        for hour, count in zip(hours, exact, strict=True)
    ]
