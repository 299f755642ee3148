"""Times of sources: times without a zone, and rounding of times finer than a microsecond."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import DefinitionError, SchemaMismatch
from feature_jobs.store import FileSource, SqlSource
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.types.casting import cast_feature, cast_time
from feature_jobs.store.types.instants import (
    TIME,
    Rounding,
    column_to_utc,
    parse_instant,
    to_micros,
    utc_instant,
)
from tests.projects.features import INCOME

ZONE = "America/Los_Angeles"
NS = pa.timestamp("ns", "UTC")


@pytest.mark.parametrize(
    ("local_text", "utc"),
    [
        ("2024-01-01T00:00:00", "2024-01-01T08:00:00Z"),
        ("2024-07-01T00:00:00", "2024-07-01T07:00:00Z"),
        ("2024-03-10T01:59:59", "2024-03-10T09:59:59Z"),
        ("2024-03-10T02:30:00", "2024-03-10T10:30:00Z"),  # missing: by the offset from before
        ("2024-03-10T03:00:00", "2024-03-10T10:00:00Z"),
        ("2024-11-03T00:59:59", "2024-11-03T07:59:59Z"),
        ("2024-11-03T01:30:00", "2024-11-03T09:30:00Z"),  # repeated: the second pass
        ("2024-11-03T02:00:00", "2024-11-03T10:00:00Z"),
        ("2024-11-03T01:30:00-07:00", "2024-11-03T08:30:00Z"),
        ("2024-01-01T00:00:00Z", "2024-01-01T00:00:00Z"),
    ],
)
def test_local_time_means_the_later_instant(local_text: str, utc: str) -> None:
    """Columns of every unit and text give the same instant. A time with a zone ignores the declared zone."""
    local, expected = datetime.fromisoformat(local_text), datetime.fromisoformat(utc)
    assert parse_instant(local_text, ZONE, Rounding.exact) == expected
    for unit in ("s", "ms", "us", "ns"):
        kind = pa.timestamp(unit, None if local.tzinfo is None else "UTC")
        column = pa.chunked_array([pa.array([local, None], kind)])
        converted = column_to_utc(column, ZONE)
        assert (converted.type, converted.to_pylist()) == (pa.timestamp(unit, "UTC"), [expected, None])


@given(
    st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2100, 1, 1)),
    st.sampled_from([ZONE, "Europe/London", "Asia/Dubai", "Australia/Lord_Howe", "Africa/Casablanca"]),
)
def test_columns_and_single_times_agree(local: datetime, zone: str) -> None:
    """Polars and Python give the same instant, which is never earlier than either reading of the local time."""
    column = pa.chunked_array([pa.array([local], pa.timestamp("us"))])
    [converted] = column_to_utc(column, zone).to_pylist()
    assert converted == utc_instant(local, zone)
    readings = [local.replace(tzinfo=ZoneInfo(zone), fold=fold).astimezone(UTC) for fold in (0, 1)]
    assert converted == max(readings)


@pytest.mark.parametrize(
    ("nanoseconds", "up", "down"),
    [
        *[(0, 0, 0), (1, 1, 0), (999, 1, 0), (1000, 1, 1), (-1, 0, -1), (-1000, -1, -1), (-1001, -1, -2)],
        (2**63 - 1, 9223372036854776, 9223372036854775),
        (1 - 2**63, -9223372036854775, -9223372036854776),
    ],
)
def test_nanoseconds_are_rounded_up_or_down(nanoseconds: int, up: int, down: int) -> None:
    """This includes instants before 1970, and both ends of the range of nanoseconds."""
    column = pa.chunked_array([pa.array([nanoseconds, None], NS)])
    rounded = [
        to_micros(column, rounding).cast(pa.int64()).to_pylist() for rounding in (Rounding.up, Rounding.down)
    ]
    assert rounded == [[up, None], [down, None]]


def test_feature_time_is_exact_or_refused() -> None:
    """Nanoseconds that are whole microseconds are cast; other nanoseconds are refused."""
    whole = pa.chunked_array([pa.array([1000], NS)])
    assert cast_feature(whole, TIME, name="seen").to_pylist() == [datetime(1970, 1, 1, 0, 0, 0, 1, UTC)]
    with pytest.raises(SchemaMismatch, match=r"'seen' .*finer than microseconds"):
        cast_feature(pa.chunked_array([pa.array([1001], NS)]), TIME, name="seen")
    with pytest.raises(SchemaMismatch, match="'at' should be timestamp"):
        cast_time(pa.chunked_array([[1]]), name="at", rounding=Rounding.up)


@pytest.mark.parametrize(
    ("text", "up", "exact"),
    [
        ("2024-01-01T00:00:00.1234560Z", 123456, 123456),
        ("2024-01-01T00:00:00.1234561Z", 123457, None),
        ("2024-01-01T00:00:00,0000001", 1, None),
        ("2024-01-01", 0, 0),
        ("9999-12-31T23:59:59.9999999Z", None, None),
        ("01/02/2024", None, None),
        (1704067200, None, None),
    ],
)
def test_text_is_rounded_as_columns_are(text: object, up: int | None, exact: int | None) -> None:
    """Python itself would truncate the finer digits."""
    day = datetime(2024, 1, 1, tzinfo=UTC)
    for rounding, expected in ((Rounding.up, up), (Rounding.exact, exact)):
        parsed = parse_instant(text, None, rounding)
        assert parsed == (None if expected is None else day + timedelta(microseconds=expected))


def test_zone_is_recorded_only_if_declared() -> None:
    """An unknown zone is refused, and a declared zone changes the view's version."""
    sources = [
        lambda zone: FileSource("x.parquet", event_timestamp="at", zone=zone),
        lambda zone: SqlSource(url="sqlite:///x.db", table="t", event_timestamp="at", zone=zone),
        lambda zone: KafkaSource("h:1", "t", event_timestamp="at", zone=zone),
    ]
    for make in sources:
        assert "zone" not in make(None).definition()
        assert make(ZONE).definition()["zone"] == ZONE
        with pytest.raises(DefinitionError, match="unknown zone 'America/Los_Angles'; did you mean"):
            make("America/Los_Angles")
    assert replace(INCOME, source=sources[0](ZONE)).version != INCOME.version
