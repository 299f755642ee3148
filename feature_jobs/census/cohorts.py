"""Monthly employment rates per age band and schooling, as an office publishes them: early, then corrected.

A month's first publication rests on the outcomes known when it appears; 20 days later a correction of the same month
takes in those that came late. Neither ever holds an outcome that was not known at its own publication.
"""

from __future__ import annotations

import datetime as dt

import polars as pl

from feature_jobs.census.transforms import age_band, schooling

PUBLISHED_AFTER = dt.timedelta(days=3)
CORRECTED_AFTER = dt.timedelta(days=20)
TRAILING = dt.timedelta(days=365)
MIN_OUTCOMES = 5


def publications(outcomes: pl.DataFrame, *, year: int) -> pl.DataFrame:
    """All rows that the office publishes about the months of one year.

    Args:
        outcomes: AGEP, SCHL, employed (0 or 1), surveyed_at, known_at.
        year: of the months.

    Returns:
        age_band, schooling, month_end, published_at, employment_rate, outcomes; sorted by publication.
    """
    table = outcomes.to_arrow()
    banded = outcomes.with_columns(
        age_band=pl.Series(age_band(table["AGEP"])), schooling=pl.Series(schooling(table["SCHL"]))
    )
    rows = [
        rates(banded, month_end=month_end, published_at=month_end + after)
        for month_end in month_ends(year)
        for after in (PUBLISHED_AFTER, CORRECTED_AFTER)
    ]
    return pl.concat(rows).sort("published_at", "month_end", "age_band", "schooling")


def rates(outcomes: pl.DataFrame, *, month_end: dt.datetime, published_at: dt.datetime) -> pl.DataFrame:
    """The rates of people surveyed in the year up to a month's end, over outcomes known at publication."""
    surveyed = pl.col("surveyed_at").is_between(month_end - TRAILING, month_end, closed="right")
    return (
        outcomes.filter(surveyed & (pl.col("known_at") <= published_at))
        .drop_nulls(["age_band", "schooling"])
        .group_by("age_band", "schooling")
        .agg(employment_rate=pl.col("employed").mean(), outcomes=pl.len().cast(pl.Int64))
        .filter(pl.col("outcomes") >= MIN_OUTCOMES)
        .with_columns(
            month_end=pl.lit(month_end).dt.cast_time_unit("us"),
            published_at=pl.lit(published_at).dt.cast_time_unit("us"),
        )
    )


def month_ends(year: int) -> list[dt.datetime]:
    """The last instant of each month: midnight at the start of the next."""
    return [dt.datetime(year + month // 12, month % 12 + 1, 1, tzinfo=dt.UTC) for month in range(1, 13)]
