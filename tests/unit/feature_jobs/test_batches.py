"""The same content is stored once, and once more when the view would make something else of it."""

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
from feature_jobs.store import Entity, FeatureView, Field, FileSource, NotNull, Sensitivity
from feature_jobs.store.ingestion.batch_history import BatchHistory, PlannedBatch
from feature_jobs.store.ingestion.ranges import TimeRange, chunks, parse_range, parse_span

PERSON = Entity("person", join_keys=["person_id"])
AMOUNT = Field("amount", "float64")
VIEW = FeatureView(
    "income",
    entities=[PERSON],
    source=FileSource("income.parquet", event_timestamp="at"),
    schema=[AMOUNT],
)


def batch(view: FeatureView, **said: Any) -> dict[str, Any]:
    """What the ledger says of content `d` in a view."""
    return {"view": "income", "view_version": view.version, "source_digest": "d", "ingest_id": "x"} | said


def next_of(
    view: FeatureView, *batches: dict[str, Any], known: Sequence[FeatureView], digest: str = "d"
) -> str | None:
    definitions = {("income", one.version): one.definition() for one in known}
    ingested = BatchHistory(view.definition(), digest, batches=batches, definitions=definitions)
    return next((wanted.ingest_id for wanted in ingested.missing()), None)


def ingested_again(view: FeatureView, before: FeatureView) -> bool:
    """Whether the content would be stored once more, after `before` had stored it."""
    return next_of(view, batch(before), known=[before]) is not None


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
def test_content_is_stored_once_where_rows_would_be_the_same(changes: dict[str, Any]) -> None:
    """Who owns a view, or for how long a value counts, changes no row."""
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
def test_content_is_stored_again_where_rows_would_differ(changes: dict[str, Any]) -> None:
    """A new column is filled by ingesting the old files again."""
    assert ingested_again(replace(VIEW, **changes), VIEW)


def test_rows_under_other_times_are_put_right() -> None:
    """After a zone or a lag was declared, until every batch was mended; not where they are stored in parts."""
    zoned = replace(VIEW, source=FileSource("income.parquet", event_timestamp="at", zone="Asia/Dubai"))
    definitions = {("income", one.version): one.definition() for one in (VIEW, zoned)}
    mended = batch(zoned, mend_id="m", batch="x")
    day = {"start": "2024-01-01T00:00:00+00:00", "end": "2024-01-02T00:00:00+00:00"}
    for batches, moved, in_parts, left in (
        ([], False, False, 1),
        ([batch(VIEW)], True, False, 1),
        ([batch(VIEW, rows_in=0)], False, False, 1),
        ([batch(VIEW, **day)], True, True, 1),
        ([batch(VIEW), mended], False, False, 0),
        ([batch(VIEW), batch(VIEW, ingest_id="y"), mended], True, False, 0),  # killed between the two
        ([batch(zoned)], False, False, 0),
    ):
        found = BatchHistory(zoned.definition(), "d", batches=batches, definitions=definitions)
        assert (found.has_moved_rows, found.has_partial_batch, len(found.missing())) == (
            moved,
            in_parts,
            left,
        ), batches


def test_other_content_is_another_batch() -> None:
    """Of the same view."""
    assert next_of(VIEW, batch(VIEW), known=[VIEW], digest="e") is not None
    assert next_of(VIEW, batch(VIEW) | {"view": "other"}, known=[VIEW]) is not None


def test_id_is_the_same_until_the_ledger_knows_of_the_batch() -> None:
    """A run that was killed after its commit finds it again, also when only the owner changed meanwhile."""
    assert next_of(VIEW, known=[VIEW]) == next_of(replace(VIEW, owner="risk"), known=[VIEW])


def test_going_back_to_an_earlier_definition_stores_its_rows_again() -> None:
    """Else the rows of the version between would go on counting."""
    other = replace(VIEW, checks=[NotNull("amount")])
    first, second = batch(VIEW, ingest_id="1"), batch(other, ingest_id="2")
    known = [VIEW, other]
    ids = [
        next_of(VIEW, known=known),
        next_of(other, first, known=known),
        next_of(VIEW, first, second, known=known),
    ]
    assert None not in ids
    assert len(set(ids)) == 3
    assert next_of(VIEW, first, second, batch(VIEW, ingest_id="3"), known=known) is None


DAY = timedelta(days=1)
START = datetime(2024, 1, 1, tzinfo=UTC)


def days(start: int, end: int) -> TimeRange:
    return TimeRange(START + start * DAY, START + end * DAY)


def ranged(view: FeatureView, range: TimeRange, **said: Any) -> dict[str, Any]:
    """What the ledger says of a chunk."""
    return batch(view, start=range.start.isoformat(), end=range.end.isoformat(), **said)


def missing(
    *batches: dict[str, Any], range: TimeRange | None, view: FeatureView = VIEW
) -> list[PlannedBatch]:
    known = {("income", one.version): one.definition() for one in (VIEW, OTHER)}
    ingested = BatchHistory(view.definition(), "d", batches=batches, definitions=known)
    return ingested.missing(range, 2 * DAY)


OTHER = replace(VIEW, checks=[NotNull("amount")])


def test_backfill_goes_on_where_it_was() -> None:
    """The chunks that the ledger knows are left out, and the others keep their ids."""
    whole = missing(range=days(0, 5))
    assert [plan.event_range for plan in whole] == [days(0, 2), days(2, 4), days(4, 5)]
    assert missing(ranged(VIEW, days(0, 2)), range=days(0, 5)) == whole[1:]
    assert len({one.ingest_id for one in whole}) == 3


def test_backfill_of_what_was_ingested_whole_does_nothing() -> None:
    """But a backfill does not stand for the whole source, nor for what another definition makes of it."""
    assert missing(batch(VIEW), range=days(0, 5)) == []
    assert len(missing(ranged(VIEW, days(0, 5)), range=None)) == 1
    assert [plan.event_range for plan in missing(ranged(VIEW, days(0, 2)), range=days(0, 2), view=OTHER)] == [
        days(0, 2)
    ]
    again = missing(ranged(VIEW, days(0, 2)), ranged(OTHER, days(0, 2), ingest_id="2"), range=days(0, 2))
    assert again[0].ingest_id != missing(range=days(0, 2))[0].ingest_id


RANGES = st.tuples(st.integers(0, 20), st.integers(1, 8)).map(lambda one: days(one[0], one[0] + one[1]))


@given(st.lists(st.tuples(RANGES, st.none() | st.integers(1, 5))))
def test_each_day_is_stored_once_whatever_ranges_and_chunks(
    commands: list[tuple[TimeRange, int | None]],
) -> None:
    """Backfills that overlap add up to their union."""
    done: list[TimeRange] = []
    for wanted, span in commands:
        done += chunks(wanted, None if span is None else span * DAY, done)
    stored = [day for one in done for day in range((one.start - START).days, (one.end - START).days)]
    asked = {day for one, _ in commands for day in range((one.start - START).days, (one.end - START).days)}
    assert sorted(stored) == sorted(asked)


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
def test_range_that_makes_no_sense_is_refused(parse: Any, words: str) -> None:
    """Before anything is read."""
    with pytest.raises(ConfigError, match=words):
        parse()


def test_range_has_its_start_and_not_its_end() -> None:
    """A row without a time lies in no range."""
    times = pa.chunked_array(
        [pa.array([None, START, START + DAY, START + 2 * DAY], pa.timestamp("us", "UTC"))]
    )
    assert times.filter(in_range(times, days(0, 2))).to_pylist() == [START, START + DAY]
