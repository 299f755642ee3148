"""Verdicts on served values of an aggregated view: lag, missing, or mismatch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from feature_jobs.store.definitions.aggregations import Aggregation, window_spec
from feature_jobs.store.skew.comparison import AS_OF, FLOOR_AS_OF, FLOOR_SEQ, POSITION, REQUESTED
from feature_jobs.store.skew.windows import explain_window_differences

START = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")
SPEC = window_spec(
    "id",
    [
        *Aggregation("amount", "sum", windows=[timedelta(hours=5)]).definition(),
        *Aggregation("amount", "count", windows=[timedelta(hours=5)]).definition(),
    ],
    {"id": "string", "amount": "float64"},
)


def at(hour: float | None) -> datetime | None:
    return None if hour is None else START + timedelta(hours=hour)


EVENTS = pl.DataFrame(
    [(1, at(1), at(1), 0, "a", 1.0), (1, at(2), at(2), 1, "b", 2.0), (1, at(1), at(3), 2, "a", 9.0)],
    schema={"key": pl.Int64, "event_timestamp": TIME, "created_timestamp": TIME}
    | {"ingest_seq": pl.Int64, "id": pl.String, "amount": pl.Float64},
    orient="row",
)


@pytest.mark.parametrize(
    ("served", "as_of", "floor", "expected"),
    [
        (1.0, 4, (0, 1), "lag"),
        (3.0, 4, (1, 2), "lag"),
        (3.0, 4, (2, 2.5), "lag"),
        (3.0, 4, (2, 3), "mismatch"),
        (2.0, 6.5, (1, 2), "lag"),
        (11.0, 4, (1, 2), "mismatch"),
        (None, 4, (1, 2), "online_missing"),
        (None, 4, (None, None), "lag"),
        (1.0, 4, (None, None), "offline_missing"),
        (1.0, 4, (2, 0), "offline_missing"),
    ],
    ids=[
        "one event materialised",
        "two events materialised",
        "the correction was not known as of the materialisation",
        "the correction was materialised",
        "an event has left the window since",
        "a value of no known set of events",
        "not in the online store",
        "not materialised yet",
        "served, although the view was never materialised",
        "served, although no event was known",
    ],
)
def test_difference_has_one_cause(
    served: float | None, as_of: float, floor: tuple[Any, Any], expected: str
) -> None:
    """Only the state of the last materialisation, at the request's `as_of`, explains a value."""
    requests = pl.DataFrame(
        [(0, 1, at(as_of), at(as_of), floor[0], at(floor[1]))],
        schema={POSITION: pl.UInt32, "key": pl.Int64, AS_OF: TIME, REQUESTED: TIME}
        | {FLOOR_SEQ: pl.Int64, FLOOR_AS_OF: TIME},
        orient="row",
    )
    verdicts = explain_window_differences(
        requests,
        EVENTS,
        keys=["key"],
        windows=SPEC,
        feature="amount_sum_5h",
        online=pl.Series([served], dtype=pl.Float64),
    )
    assert verdicts.rows() == [(0, expected)]


def test_requests_keep_their_order() -> None:
    """Requests after several materialisations, in any order."""
    floors = [(1, at(2)), (0, at(1)), (None, None), (1, at(2))]
    requests = pl.DataFrame(
        [(position, 1, at(4), at(4), *floor) for position, floor in enumerate(floors)],
        schema={POSITION: pl.UInt32, "key": pl.Int64, AS_OF: TIME, REQUESTED: TIME}
        | {FLOOR_SEQ: pl.Int64, FLOOR_AS_OF: TIME},
        orient="row",
    )
    online = pl.Series([2, 1, None, 7], dtype=pl.Int64)
    verdicts = explain_window_differences(
        requests, EVENTS, keys=["key"], windows=SPEC, feature="amount_count_5h", online=online
    )
    assert dict(verdicts.rows()) == {0: "lag", 1: "lag", 2: "lag", 3: "mismatch"}
