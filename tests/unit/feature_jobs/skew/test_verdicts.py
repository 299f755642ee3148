"""Verdicts on served values (mismatch, lag, missing) compared with values computed by hand."""

from __future__ import annotations

import dataclasses
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_jobs.store.skew.comparison import (
    AS_OF,
    FLOOR_AS_OF,
    FLOOR_SEQ,
    POSITION,
    REQUESTED,
    FeatureSkew,
    Verdict,
    differs,
    explain_differences,
    feature_skew,
)
from feature_jobs.store.skew.served import ServedRequests, read_served
from tests.projects.views import make_spec, service_of

START = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def history(*rows: tuple[float, float, Any]) -> pl.DataFrame:
    """Return rows of entity 1 from (event hour, ingestion hour, value), in order of `ingest_seq`."""
    return pl.DataFrame(
        [(1, at(event), at(event), seq, at(known), value) for seq, (event, known, value) in enumerate(rows)],
        schema={"key": pl.Int64, "event_timestamp": TIME, "created_timestamp": TIME}
        | {"ingest_seq": pl.Int64, "ingested_at": TIME, "value": pl.Int64},
        orient="row",
    )


def verdict(
    served: int | None,
    rows: pl.DataFrame,
    *,
    as_of: float = 10,
    requested: float = 10,
    floor: tuple[int, float] | None = None,
    ttl_h: float | None = None,
) -> str:
    floor_seq, floor_hour = floor or (None, None)
    requests = pl.DataFrame(
        [(0, 1, at(as_of), at(requested), floor_seq, None if floor_hour is None else at(floor_hour))],
        schema={POSITION: pl.Int64, "key": pl.Int64, AS_OF: TIME, REQUESTED: TIME}
        | {FLOOR_SEQ: pl.Int64, FLOOR_AS_OF: TIME},
        orient="row",
    )
    online = pl.Series([served], dtype=pl.Int64)
    ttl = None if ttl_h is None else timedelta(hours=ttl_h)
    verdicts = explain_differences(requests, rows, keys=["key"], feature="value", online=online, ttl=ttl)
    [only] = verdicts["verdict"].to_list()
    return str(only)


TWO = [(1, 1, 4), (2, 2, 5)]


@pytest.mark.parametrize(
    ("served", "rows", "more", "expected"),
    [
        pytest.param(7, [(1, 1, 5)], {}, "mismatch", id="never stored"),
        pytest.param(4, TWO, {}, "lag", id="an older row, never materialised"),
        pytest.param(4, TWO, {"floor": (0, 9)}, "lag", id="materialised before the newer row came"),
        pytest.param(4, TWO, {"floor": (1, 9)}, "mismatch", id="the newer row was materialised"),
        pytest.param(4, TWO, {"floor": (1, 1.5)}, "lag", id="the newer row was not available then"),
        pytest.param(4, [(1, 1, 4), (2, 11, 5)], {}, "lag", id="the newer row was ingested later"),
        pytest.param(5, [(1, 1, 4), (2, 11, 5), (3, 12, 6)], {"floor": (0, 9)}, "lag", id="pushed early"),
        pytest.param(6, [(1, 1, 4), (11, 2, 6)], {}, "mismatch", id="a row that is not available yet"),
        pytest.param(None, [(1, 1, 4)], {}, "online_missing", id="not in the online store"),
        pytest.param(None, [(1, 11, 4)], {}, "lag", id="stored after the request"),
        pytest.param(4, [(1, 1, 4), (2, 2, None)], {"floor": (1, 9)}, "offline_missing", id="now null"),
        pytest.param(4, [(1, 1, 4)], {"ttl_h": 5}, "offline_missing", id="expired"),
        pytest.param(4, [], {}, "offline_missing", id="the entity is unknown offline"),
        pytest.param(9, [(1, 1, 4)], {"ttl_h": 5}, "offline_missing", id="a wrong value, although expired"),
    ],
)
def test_difference_has_one_cause(
    served: int | None, rows: list[Any], more: dict[str, Any], expected: str
) -> None:
    """The request and its `as_of` are at hour ten by default."""
    assert verdict(served, history(*rows), **more) == expected


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=6),
    st.data(),
)
def test_value_that_the_store_may_have_had_is_never_a_mismatch(rows: list[Any], data: st.DataObject) -> None:
    """Any row that was available and ingested may be the stored one, if no newer row had reached the store."""
    table = history(*rows)
    held = data.draw(st.integers(0, len(rows) - 1))
    assert verdict(rows[held][2], table) == "lag"


def test_null_on_both_sides_is_equal_and_floats_are_compared_exactly() -> None:
    """A difference in the last digit is a difference, because the value was made in another way."""
    online = pl.Series([None, 0.1 + 0.2, 1.0, None])
    offline = pl.Series([None, 0.3, 1.0, 2.0])
    assert differs(online, offline).to_list() == [False, True, False, True]


def test_counts_and_smape_follow_the_formula() -> None:
    """Two thirds and twice 0 over three pairs. Nulls do not count. The sum of parts equals the whole."""
    online, offline = pl.Series([1, 0, 5, None]), pl.Series([2, 0, 5, 4])
    verdicts = pl.Series(["mismatch", "equal", "equal", "online_missing"])
    skew = feature_skew(online, offline, verdicts)
    smape = pytest.approx(2 / 9)
    counts = {"compared": 4, "equal": 2, "lag": 0, "online_missing": 1, "offline_missing": 0, "mismatch": 1}
    assert skew.report() == counts | {"smape": smape}
    parts = [feature_skew(online[i : i + 1], offline[i : i + 1], verdicts[i : i + 1]) for i in range(4)]
    assert sum(parts, FeatureSkew()).report() == skew.report()
    text = pl.Series(["a"])
    assert feature_skew(text, text, pl.Series([Verdict.equal.value])).smape is None


def record(number: int, **changes: Any) -> dict[str, Any]:
    """Return a logged prediction of two entities."""
    base: dict[str, Any] = {
        "prediction_id": f"p{number}",
        "time": at(10 + number).isoformat(),
        "as_of": at(10).isoformat(),
        "version": 1,
        "entities": [{"person_id": 1}, {"person_id": 2}],
        "features": {"person__age_band": ["a", "b"], "person__seen": [5, None]},
        "given": [],
    }
    return base | changes


def test_requests_that_cannot_be_repeated_are_counted() -> None:
    """Requests with all their features, records without `given`, and requests before `since` are left out."""
    old = record(0)
    del old["given"]
    complete = record(1, entities=[{}, {}], given=["person__age_band", "person__seen"])
    groups, left_out, _ = read_served([old, complete, record(2), record(3)], since=None)
    assert [group.ids for group in groups] == [[("p2", 0), ("p2", 1), ("p3", 0), ("p3", 1)]]
    assert left_out == 4
    [late], *_ = read_served([record(2), record(3)], since=at(13))
    assert late.ids == [("p3", 0), ("p3", 1)]


def test_requests_without_a_score_are_counted() -> None:
    """Records of this and of an older release, which logged a null for a NaN."""
    nulls = [{"probability": None, "label": 0}, {"probability": 0.5, "label": 1}]
    without = [record(1, fault="gave no score", predictions=[]), record(2, predictions=nulls)]
    assert read_served(without, since=None) == ([], 0, 4)


def test_served_values_have_the_dtype_of_the_feature() -> None:
    """Other values in the same column do not change a digit."""
    large = 2**53 + 1
    [group], *_ = read_served([record(1, features={"person__seen": [large, 1.5]})], since=None)
    spec = next(one for one in SERVICE.views[0].fields if one.name == "seen")
    assert group.column("person__seen", dataclasses.replace(spec, dtype="int64")).to_list() == [large, None]


@pytest.mark.parametrize(
    ("dtype", "logged", "value"),
    [
        ("date", 19_000, date(2022, 1, 8)),
        ("decimal(12, 2)", "12.50", Decimal("12.50")),
        ("bytes", b"\0\xff", b"\0\xff"),
        ("list<float32, 2>", [0.5, 1.0], [0.5, 1.0]),
        ("list<string>", ["a"], ["a"]),
    ],
)
def test_served_values_of_every_type_can_be_compared(dtype: str, logged: Any, value: Any) -> None:
    """The values have the form of the online store."""
    group = ServedRequests(version=1, client_inputs=(), features={"v__x": [logged, None]})
    assert group.column("v__x", dataclasses.replace(PERSON.fields[1], dtype=dtype)).to_list() == [value, None]


def test_requests_are_grouped_by_version_and_client_inputs() -> None:
    """Each group can be read with one join."""
    groups, *_ = read_served([record(1), record(2, version=2), record(3, given=["person__seen"])], since=None)
    assert [group.version for group in groups] == [1, 2, 1]
    assert [group.client_inputs for group in groups] == [(), (), ("person__seen",)]


def test_key_from_an_earlier_view_is_the_served_value() -> None:
    """If the client sent the key, the feature of the earlier view is not used."""
    [group], *_ = read_served([record(1)], since=None)
    assert group.entity_rows(SERVICE).to_pydict()["age_band"] == ["a", "b"]
    [sent], *_ = read_served([record(1, given=["person__age_band"])], since=None)
    assert "age_band" not in sent.entity_rows(SERVICE).column_names


def test_served_time_is_read_from_microseconds() -> None:
    """The online store returns times as microseconds."""
    [group], *_ = read_served([record(1)], since=None)
    seen = group.column("person__seen", PERSON.fields[1])
    assert seen.to_list() == [datetime(1970, 1, 1, 0, 0, 0, 5, UTC), None]


PERSON = make_spec("person", ["person_id"], age_band="string", seen="timestamp")
COHORT = make_spec("cohort", ["age_band"], rate="float64")
SERVICE = service_of(PERSON, COHORT)
