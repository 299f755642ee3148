"""The same content is stored once, and again only if a change of the view changes its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from feature_jobs.batches.reading import in_range
from feature_jobs.store import FeatureView, Field, FileSource, NotNull, Sensitivity
from feature_jobs.store.ingestion.batch_history import BatchHistory, PlannedBatch
from feature_jobs.store.ingestion.ranges import TimeRange, chunks, parse_range, parse_span
from tests.projects.views import make_view

AMOUNT = Field("amount", "float64")
VIEW = make_view(source=FileSource("income.parquet", event_timestamp="at"))


def batch(view: FeatureView, **fields: Any) -> dict[str, Any]:
    """Return the payload of an event for content `d` of a view."""
    return {"view": "income", "view_version": view.version, "source_digest": "d", "ingest_id": "x"} | fields


def next_id(
    view: FeatureView, *batches: dict[str, Any], applied: Sequence[FeatureView], digest: str = "d"
) -> str | None:
    """Return the id of the batch that would be stored next, or None if the content is stored already."""
    history = BatchHistory(view.definition(), digest, batches=batches, definitions=definitions(*applied))
    return next((plan.ingest_id for plan in history.missing()), None)


def definitions(*views: FeatureView) -> dict[tuple[str, str], dict[str, Any]]:
    return {("income", view.version): view.definition() for view in views}


def ingested_again(view: FeatureView, before: FeatureView) -> bool:
    """Return True if the content is stored again after `before` has stored it."""
    return next_id(view, batch(before), applied=[before]) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"owner": "risk"},
        {"ttl": timedelta(days=1)},
        {"purposes": ["credit"], "region": "eu", "retention": timedelta(days=9), "subject_key": "person_id"},
        {"schema": [replace(AMOUNT, description="in euro")]},
        {"source": FileSource("moved.parquet", event_timestamp="at")},
    ],
)
def test_content_is_not_stored_again_if_its_rows_are_the_same(changes: dict[str, Any]) -> None:
    """The owner of a view, or the time-to-live of a value, changes no row."""
    assert not ingested_again(replace(VIEW, **changes), VIEW)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": [AMOUNT, Field("sector", "string")]},
        {"schema": [replace(AMOUNT, sensitivity=Sensitivity.PERSONAL)]},
        {"checks": [NotNull("amount")]},
        {"source": FileSource("income.parquet", event_timestamp="at", created_timestamp="known")},
        {"created_lag": timedelta(days=1)},
        {"source": FileSource("income.parquet", event_timestamp="at", zone="Asia/Dubai")},
    ],
)
def test_content_is_stored_again_if_its_rows_differ(changes: dict[str, Any]) -> None:
    """For example, ingesting the old files again fills a new column."""
    assert ingested_again(replace(VIEW, **changes), VIEW)


def test_batches_with_moved_times_are_found_until_they_are_mended() -> None:
    """Times move when a zone or a lag is declared. Batches that hold a part of the source cannot be mended."""
    zoned = replace(VIEW, source=FileSource("income.parquet", event_timestamp="at", zone="Asia/Dubai"))
    applied = definitions(VIEW, zoned)
    mended = batch(zoned, mend_id="m", batch="x")
    day = {"start": "2024-01-01T00:00:00+00:00", "end": "2024-01-02T00:00:00+00:00"}
    for batches, has_moved, is_partial, num_missing in (
        ([], False, False, 1),
        ([batch(VIEW)], True, False, 1),
        ([batch(VIEW, rows_in=0)], False, False, 1),
        ([batch(VIEW, **day)], True, True, 1),
        ([batch(VIEW), mended], False, False, 0),
        ([batch(VIEW), batch(VIEW, ingest_id="y"), mended], True, False, 0),  # killed after the first of two
        ([batch(zoned)], False, False, 0),
    ):
        history = BatchHistory(zoned.definition(), "d", batches=batches, definitions=applied)
        assert history.has_moved_rows == has_moved, batches
        assert history.has_partial_batch == is_partial, batches
        assert len(history.missing()) == num_missing, batches


def test_other_content_or_another_view_is_another_batch() -> None:
    """A stored batch does not stand for them."""
    assert next_id(VIEW, batch(VIEW), applied=[VIEW], digest="e") is not None
    assert next_id(VIEW, batch(VIEW) | {"view": "other"}, applied=[VIEW]) is not None


def test_id_stays_the_same_until_the_batch_has_an_event() -> None:
    """A command that was killed after its commit finds the batch again, even if the owner changed meanwhile."""
    assert next_id(VIEW, applied=[VIEW]) == next_id(replace(VIEW, owner="risk"), applied=[VIEW])


def test_going_back_to_an_earlier_definition_stores_its_rows_again() -> None:
    """Otherwise the rows of the definition in between would still count."""
    other = replace(VIEW, checks=[NotNull("amount")])
    first, second = batch(VIEW, ingest_id="1"), batch(other, ingest_id="2")
    applied = [VIEW, other]
    histories = ((VIEW, []), (other, [first]), (VIEW, [first, second]))
    ids = [next_id(view, *batches, applied=applied) for view, batches in histories]
    assert None not in ids
    assert len(set(ids)) == 3
    assert next_id(VIEW, first, second, batch(VIEW, ingest_id="3"), applied=applied) is None


DAY = timedelta(days=1)
START = datetime(2024, 1, 1, tzinfo=UTC)


def days(start: int, end: int) -> TimeRange:
    return TimeRange(START + start * DAY, START + end * DAY)


def chunk(view: FeatureView, time_range: TimeRange, **fields: Any) -> dict[str, Any]:
    """Return the payload of an event for a chunk."""
    return batch(view, start=time_range.start.isoformat(), end=time_range.end.isoformat(), **fields)


def missing(
    *batches: dict[str, Any], within: TimeRange | None, view: FeatureView = VIEW
) -> list[PlannedBatch]:
    """Return the missing chunks of two days."""
    known = definitions(VIEW, OTHER)
    return BatchHistory(view.definition(), "d", batches=batches, definitions=known).missing(within, 2 * DAY)


OTHER = replace(VIEW, checks=[NotNull("amount")])


def test_backfill_continues_with_the_missing_chunks() -> None:
    """Chunks with an event are left out, and the others keep their ids."""
    whole = missing(within=days(0, 5))
    assert [plan.event_range for plan in whole] == [days(0, 2), days(2, 4), days(4, 5)]
    assert missing(chunk(VIEW, days(0, 2)), within=days(0, 5)) == whole[1:]
    assert len({plan.ingest_id for plan in whole}) == 3


def test_backfill_of_a_whole_stored_source_does_nothing() -> None:
    """But a stored backfill does not count as the whole source, and not as the rows of another definition."""
    assert missing(batch(VIEW), within=days(0, 5)) == []
    assert len(missing(chunk(VIEW, days(0, 5)), within=None)) == 1
    [other] = missing(chunk(VIEW, days(0, 2)), within=days(0, 2), view=OTHER)
    assert other.event_range == days(0, 2)
    again = missing(chunk(VIEW, days(0, 2)), chunk(OTHER, days(0, 2), ingest_id="2"), within=days(0, 2))
    assert again[0].ingest_id != missing(within=days(0, 2))[0].ingest_id


RANGES = st.builds(lambda start, length: days(start, start + length), st.integers(0, 20), st.integers(1, 8))


@given(st.lists(st.tuples(RANGES, st.none() | st.integers(1, 5))))
def test_overlapping_backfills_store_each_day_once(commands: list[tuple[TimeRange, int | None]]) -> None:
    """Together, the backfills store the union of their ranges, with any chunk lengths."""
    done: list[TimeRange] = []
    for wanted, span in commands:
        done += chunks(wanted, None if span is None else span * DAY, done)
    stored = [day for part in done for day in days_in(part)]
    wanted_days = {day for wanted, _ in commands for day in days_in(wanted)}
    assert sorted(stored) == sorted(wanted_days)


def days_in(time_range: TimeRange) -> range:
    return range((time_range.start - START).days, (time_range.end - START).days)


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (lambda: parse_range("2024-01-01", None), "both start and end"),
        (lambda: parse_range("2024-01-02", "2024-01-01"), "start must be before end"),
        (lambda: parse_range("January", "2024-01-01"), "start must be an ISO 8601 instant"),
        (lambda: parse_span("30"), "such as 30d"),
        (lambda: parse_span("0d"), "such as 30d"),
    ],
)
def test_invalid_range_or_span_is_refused(parse: Any, words: str) -> None:
    """The message says what is expected."""
    with pytest.raises(ConfigError, match=words):
        parse()


def test_range_includes_its_start_and_excludes_its_end() -> None:
    """A row without a time is in no range."""
    moments = [None, START, START + DAY, START + 2 * DAY]
    times = pa.chunked_array([pa.array(moments, pa.timestamp("us", "UTC"))])
    assert times.filter(in_range(times, days(0, 2))).to_pylist() == [START, START + DAY]
