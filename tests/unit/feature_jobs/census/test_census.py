"""The census example: real people, generated dates, and publications without later outcomes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa
import pytest

from feature_jobs.census import cohort, employment, person
from feature_jobs.census.cohorts import MIN_OUTCOMES, TRAILING, month_ends, publications, rates
from feature_jobs.census.source import (
    FIRST_FAULT_ID,
    NUM_FAULTS,
    deliver,
    entities,
    outcomes,
    records,
)
from feature_jobs.census.transforms import age_band, schooling, with_bands
from feature_jobs.store.ingestion.validation import REASON, prepare

NOW = datetime(2020, 1, 1, tzinfo=UTC)
ROWS_BY_YEAR = {2015: 68_785, 2016: 69_126, 2017: 69_635, 2018: 70_131}


@pytest.fixture(scope="module")
def census() -> pl.DataFrame:
    return records()


@pytest.fixture(scope="module")
def known(census: pl.DataFrame) -> pl.DataFrame:
    return outcomes(census)


def test_every_real_record_occurs_once(census: pl.DataFrame) -> None:
    """Each person has an outcome and a survey date in the year of the record."""
    assert dict(census.group_by("year").len().sort("year").iter_rows()) == ROWS_BY_YEAR
    assert census["person_id"].is_unique().all()
    assert {0, 1} == set(census["employed"].unique())
    assert (census["surveyed_at"].dt.year() == census["year"]).all()


def test_dates_depend_on_the_id_alone(census: pl.DataFrame) -> None:
    """Survey dates are the same in each run, and are spread over the year."""
    assert records().equals(census)
    per_month = census.filter(pl.col("year") == 2015)["surveyed_at"].dt.month().value_counts()
    assert per_month.filter(pl.col("surveyed_at") < 12)["count"].min() > 5000  # type: ignore[operator]


def test_publication_uses_only_outcomes_known_at_its_time(known: pl.DataFrame) -> None:
    """Rates equal those computed again from the outcomes known at publication."""
    banded = known.with_columns(
        age_band=pl.Series(age_band(known.to_arrow()["AGEP"])),
        schooling=pl.Series(schooling(known.to_arrow()["SCHL"])),
    )
    published = publications(known, year=2016)
    assert published.height > 500
    for row in published.sample(40, seed=1).iter_rows(named=True):
        expected = banded.filter(
            (pl.col("age_band") == row["age_band"])
            & (pl.col("schooling") == row["schooling"])
            & (pl.col("known_at") <= row["published_at"])
            & (pl.col("surveyed_at") <= row["month_end"])
            & (pl.col("surveyed_at") > row["month_end"] - TRAILING)
        )
        rate = pytest.approx(row["employment_rate"])
        assert (expected.height, expected["employed"].mean()) == (row["outcomes"], rate)


def test_late_outcome_does_not_change_a_publication(known: pl.DataFrame) -> None:
    """Inverting every outcome that was not known yet leaves the rates unchanged."""
    month_end, published_at = month_ends(2016)[5], month_ends(2016)[5] + timedelta(days=3)
    banded = known.with_columns(age_band=pl.lit("a"), schooling=pl.lit("s"))
    inverted = banded.with_columns(
        employed=pl.when(pl.col("known_at") > published_at).then(1 - pl.col("employed")).otherwise("employed")
    )
    assert not inverted.equals(banded)
    expected = rates(banded, month_end=month_end, published_at=published_at)
    assert expected.equals(rates(inverted, month_end=month_end, published_at=published_at))


def test_correction_includes_late_outcomes(known: pl.DataFrame) -> None:
    """A correction never has fewer outcomes than the first publication, and in total has more."""
    published = publications(known, year=2016).sort("published_at")
    counts = published.group_by("month_end", "age_band", "schooling", maintain_order=True).agg("outcomes")
    corrected = counts.filter(pl.col("outcomes").list.len() == 2)["outcomes"]
    assert (corrected.list.last() >= corrected.list.first()).all()
    assert corrected.list.last().sum() > corrected.list.first().sum()


def test_small_cohort_is_not_published(known: pl.DataFrame) -> None:
    """A rate of few people is noise, and could identify them."""
    assert publications(known, year=2015)["outcomes"].min() == MIN_OUTCOMES


def test_outcome_is_known_only_after_the_entity_row(census: pl.DataFrame, known: pl.DataFrame) -> None:
    """So a cohort's rate cannot leak the label of the person it describes."""
    entity_rows = entities(census)
    assert (known["known_at"] > entity_rows["event_timestamp"]).all()


def test_person_is_published_before_the_entity_row(census: pl.DataFrame) -> None:
    """Otherwise every feature would be missing."""
    people = deliver(census.head(1000), faults=0)
    assert (people["published_at"] <= entities(census.head(1000))["event_timestamp"]).all()


def test_checks_find_exactly_the_planted_faults(census: pl.DataFrame) -> None:
    """Faulty rows have ids that no real person has, and every real person passes."""
    people = census.filter(pl.col("year") == 2017)
    delivery = deliver(people, faults=NUM_FAULTS)
    checked = prepare(delivery.to_arrow(), person, now=NOW)
    bad = checked.filter(checked[REASON].is_valid())
    assert (NUM_FAULTS, ROWS_BY_YEAR[2017] + NUM_FAULTS) == (bad.num_rows, checked.num_rows)
    assert min(bad["person_id"].to_pylist()) >= FIRST_FAULT_ID > census["person_id"].max()  # type: ignore[operator]
    reasons = " ".join(bad[REASON].to_pylist())
    assert all(word in reasons for word in ("AGEP", "SCHL", "event_timestamp lies in the future"))
    assert entities(people).height == ROWS_BY_YEAR[2017]


def test_every_publication_passes_its_own_checks(known: pl.DataFrame) -> None:
    """The cohort view accepts all bands that the person view computes."""
    checked = prepare(publications(known, year=2018).to_arrow(), cohort, now=NOW)
    assert checked[REASON].null_count == checked.num_rows


def test_bands_have_readable_names_and_no_gaps() -> None:
    """Lower bounds are included, and an invalid age or code has no band."""
    ages = pa.chunked_array([[0.0, 15.9, 16.0, 25.0, 34.0, 64.0, 65.0, 94.0, -1.0, None]])
    bands = ["0-15", "0-15", "16-24", "25-34", "25-34", "55-64", "65+", "65+", None, None]
    assert age_band(ages).to_pylist() == bands
    codes = pa.chunked_array([["0", "16", "18", "21", "24", None]])
    expected = ["none", "high-school", "some-college", "bachelor", "graduate", None]
    assert expected == schooling(codes).to_pylist()


def test_transform_keeps_rows_and_order(census: pl.DataFrame) -> None:
    """The transform adds two columns and changes nothing else."""
    table = census.head(100).to_arrow()
    banded = with_bands(table)
    assert table.equals(banded.select(table.column_names))
    assert banded.column_names[-2:] == ["age_band", "schooling"]


def test_service_gives_the_cohort_its_keys_from_the_person() -> None:
    """The person view comes first and has the join keys of the cohort view."""
    assert [view.name for view in employment.views] == ["person", "cohort"]
    assert set(cohort.join_keys) <= {field.name for field in person.schema}
