"""Random events and entity rows. Keys, ids and times have few values, so ties and corrections are frequent."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl
from hypothesis import strategies as st

from feature_jobs.store.definitions.aggregations import (
    ALL_EVENTS,
    FUNCTIONS,
    Aggregation,
    WindowSpec,
    window_spec,
)

START = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")
KEYS = {"person": pl.Int64, "place": pl.String}
COLUMNS = {
    "event_id": "string",
    "amount": "float64",
    "size": "int64",
    "sector": "string",
    "seen": "timestamp",
    "flag": "bool",
}
EVENTS = KEYS | {
    "event_timestamp": TIME,
    "created_timestamp": TIME,
    "ingest_seq": pl.Int64,
    "deleted": pl.Boolean,
    "event_id": pl.String,
    "amount": pl.Float64,
    "size": pl.Int64,
    "sector": pl.String,
    "seen": TIME,
    "flag": pl.Boolean,
}
WINDOWS_H = (2, 5)
SPEC = window_spec(
    "event_id",
    [
        output
        for column, function in [
            (ALL_EVENTS, "count"),
            *(("amount", function) for function in FUNCTIONS),
            *(("size", function) for function in ("sum", "mean", "max")),
            *(("sector", function) for function in ("min", "last", "distinct")),
            *(("seen", "max"), ("seen", "distinct"), ("flag", "last")),
        ]
        for output in Aggregation(
            column, function, windows=[timedelta(hours=hours) for hours in WINDOWS_H]
        ).definition()
    ],
    COLUMNS,
)

hours = st.integers(0, 12).map(lambda hour: START + timedelta(hours=hour))
people = st.integers(1, 2)
places = st.sampled_from(["n", "s"])
quarters = st.integers(-9, 9).map(lambda number: number / 4)
_values = st.tuples(
    st.none() | quarters,
    st.none() | st.integers(-3, 3),
    st.none() | st.sampled_from(["a", "b", "c"]),
    st.none() | hours,
    st.none() | st.booleans(),
)


@st.composite
def event_frames(draw: st.DrawFn, *, min_size: int = 0) -> pl.DataFrame:
    """Draw events of a few people. One row in five is a tombstone."""
    ids = st.sampled_from("abcde")
    deleted = st.integers(0, 4).map(lambda number: number == 0)
    rows = draw(
        st.lists(
            st.tuples(people, places, hours, hours, deleted, ids, _values), min_size=min_size, max_size=25
        )
    )
    order = draw(st.permutations(range(len(rows))))
    data = [(*row[:4], seq, *row[4:6], *row[6]) for row, seq in zip(rows, order, strict=True)]
    return pl.DataFrame(data, schema=EVENTS, orient="row")


entity_frames = st.lists(
    st.tuples(st.none() | st.integers(1, 3), st.none() | places, hours), max_size=15
).map(lambda rows: pl.DataFrame(rows, schema=KEYS | {"event_timestamp": TIME}, orient="row"))


def window_of(*columns_and_functions: tuple[str, str], hours: float = 5) -> WindowSpec:
    """Return the specification of a window with a few aggregations."""
    aggregations = [
        Aggregation(column, function, windows=[timedelta(hours=hours)])
        for column, function in columns_and_functions
    ]
    outputs = [output for aggregation in aggregations for output in aggregation.definition()]
    return window_spec("event_id", outputs, COLUMNS)
