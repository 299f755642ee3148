"""Verdicts on served values of an aggregated view: lag, missing, or mismatch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from feature_jobs.store.definitions.aggregations import Aggregation, window_spec
from feature_jobs.store.skew.comparison import AS_OF, FLOOR_AS_OF, FLOOR_SEQ, POSITION, REQUESTED
from feature_jobs.store.skew.window_differences import explain_window_differences

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


def explained(requests: list[tuple[Any, ...]], feature: str, online: pl.Series) -> pl.DataFrame:
    """Return the verdicts on requests of entity 1, from (`as_of`, number and time of the materialisation)."""
    frame = pl.DataFrame(
        [(position, 1, as_of, as_of, *floor) for position, (as_of, *floor) in enumerate(requests)],
        schema={POSITION: pl.UInt32, "key": pl.Int64, AS_OF: TIME, REQUESTED: TIME}
        | {FLOOR_SEQ: pl.Int64, FLOOR_AS_OF: TIME},
        orient="row",
    )
    return explain_window_differences(
        frame, EVENTS, keys=["key"], windows=SPEC, feature=feature, online=online
    )


@pytest.mark.parametrize(
    ("served", "as_of", "floor", "expected"),
    [
        pytest.param(1.0, 4, (0, 1), "lag", id="one event materialised"),
        pytest.param(3.0, 4, (1, 2), "lag", id="two events materialised"),
        pytest.param(3.0, 4, (2, 2.5), "lag", id="the correction was not known as of the materialisation"),
        pytest.param(3.0, 4, (2, 3), "mismatch", id="the correction was materialised"),
        pytest.param(2.0, 6.5, (1, 2), "lag", id="an event has left the window since"),
        pytest.param(11.0, 4, (1, 2), "mismatch", id="a value of no known set of events"),
        pytest.param(None, 4, (1, 2), "online_missing", id="not in the online store"),
        pytest.param(None, 4, (None, None), "lag", id="not materialised yet"),
        pytest.param(
            1.0, 4, (None, None), "offline_missing", id="served, although the view was never materialised"
        ),
        pytest.param(1.0, 4, (2, 0), "offline_missing", id="served, although no event was known"),
    ],
)
def test_difference_has_one_cause(
    served: float | None, as_of: float, floor: tuple[Any, Any], expected: str
) -> None:
    """Only the state of the last materialisation, at the request's `as_of`, explains a value."""
    verdicts = explained(
        [(at(as_of), floor[0], at(floor[1]))], "amount_sum_5h", pl.Series([served], dtype=pl.Float64)
    )
    assert verdicts.rows() == [(0, expected)]


def test_requests_keep_their_order() -> None:
    """Requests after several materialisations, in any order."""
    floors = [(1, at(2)), (0, at(1)), (None, None), (1, at(2))]
    online = pl.Series([2, 1, None, 7], dtype=pl.Int64)
    verdicts = explained([(at(4), *floor) for floor in floors], "amount_count_5h", online)
    assert dict(verdicts.rows()) == {0: "lag", 1: "lag", 2: "lag", 3: "mismatch"}
