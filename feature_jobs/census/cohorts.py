"""Monthly employment rates per age band and schooling, as a statistical office would publish them.

The first publication of a month uses the outcomes that are known three days after the month's end. A correction is
published 20 days after the month's end and includes late outcomes. No publication uses an outcome that was not known
when it was published.
"""

from __future__ import annotations

import datetime as dt

import polars as pl

from feature_jobs.census.transforms import age_band, schooling

PUBLISHED_AFTER = dt.timedelta(days=3)
"""Time from the end of a month to the first publication of its rates."""
CORRECTED_AFTER = dt.timedelta(days=20)
"""Time from the end of a month to the correction of its rates."""
TRAILING = dt.timedelta(days=365)
"""A month's rates include the people who were surveyed within this time before its end."""
MIN_OUTCOMES = 5
"""A rate that is computed from fewer outcomes is not published."""


def publications(outcomes: pl.DataFrame, *, year: int) -> pl.DataFrame:
    """Return all rows that the office publishes about the months of one year.

    Args:
        outcomes: Columns AGEP, SCHL, employed (0 or 1), surveyed_at, known_at.
        year: The year of the months.

    Returns:
        Columns age_band, schooling, month_end, published_at, employment_rate, outcomes; sorted by publication time.
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
    """Return the rates of people surveyed in the year up to `month_end`, from outcomes known at `published_at`."""
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
    """Return the end of each month of a year: midnight at the start of the next month."""
    return [dt.datetime(year + month // 12, month % 12 + 1, 1, tzinfo=dt.UTC) for month in range(1, 13)]
