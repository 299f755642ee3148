"""`python -m feature_jobs.census.source`: the census as files of a statistical office, one set per year.

The people are real: the American Community Survey's public records of Massachusetts that ship in NannyML's wheel. What
the records do not say is made here and declared so: the day a person was surveyed, when the office published the
record, and when the outcome became known. The monthly cohort rates are computed from the real outcomes.

A few rows of each delivery are faulty on purpose, with ids no real person has, so that the quarantine has work to do.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl

from cluster.entrypoint import job
from cluster.errors import SourceError
from cluster.settings import PlatformConfig
from cluster.storage import resolve, write_parquet
from feature_jobs.census.cohorts import publications

ATTRIBUTES = [
    "AGEP", "SCHL", "MAR", "RELP", "DIS", "ESP", "CIT", "MIG", "MIL", "ANC", "NATIVITY", "DEAR", "DEYE", "DREM", "SEX",
    "RAC1P",
]  # fmt: skip
NUM_FAULTS = 25
FIRST_FAULT_ID = 1_000_000_000
LAST_DAY = 350
"""Surveys end in mid December, so that a year's people are all published within it."""
PUBLISHED_AFTER = dt.timedelta(days=2)
OUTCOME_AFTER_DAYS = 10
LATE_SHARE = 0.15
"""Share of outcomes that become known only 20 to 60 days later than the others."""


@dataclass(kw_only=True, slots=True)
class SourceConfig(PlatformConfig):
    """Which years to unpack."""

    years: list[int] = field(default_factory=lambda: [2015, 2016, 2017, 2018])
    faults: int = NUM_FAULTS
    """Faulty rows planted in each year's delivery of people."""
    folder: str = "data/census"
    """Outside the storage root: a source is another system, and what lies there is not protected."""


@job("census_source", SourceConfig)
def main(config: SourceConfig) -> None:
    """Write the deliveries of each year."""
    folder = resolve(config.folder)
    census = records()
    known = outcomes(census)
    for year in config.years:
        of_year = census.filter(pl.col("year") == year)
        people = deliver(of_year, faults=config.faults)
        write_parquet(people.to_arrow(), f"{folder}/person_{year}.parquet")
        rates = publications(known, year=year)
        write_parquet(rates.to_arrow(), f"{folder}/cohort_{year}.parquet")
        write_parquet(entities(of_year).to_arrow(), f"{folder}/entities_{year}.parquet")
        print(f"{year}: {people.height} people, {rates.height} cohort rates", flush=True)


def records() -> pl.DataFrame:
    """Every real record with its outcome and the synthetic day of its survey.

    Columns: person_id, the attributes (codes as text), employed (0 or 1), year, surveyed_at.
    """
    folder = _packaged()
    reference = _read(folder / "employment_MA_reference.pq")
    later = _read(folder / "employment_MA_analysis.pq").join(
        _read(folder / "employment_MA_analysis_target.pq"), on="id", how="inner"
    )
    columns = ["id", *ATTRIBUTES, "employed", "year"]
    people = pl.concat([reference.select(columns), later.select(columns)])
    days = pl.lit(pl.Series((_scatter(people["id"], salt=1) * LAST_DAY).astype(np.int64)))
    seconds = pl.lit(pl.Series((_scatter(people["id"], salt=2) * 86_400).astype(np.int64)))
    start = pl.datetime(pl.col("year"), 1, 1, time_unit="us", time_zone="UTC")
    return people.rename({"id": "person_id"}).with_columns(
        surveyed_at=start + pl.duration(days=days, seconds=seconds, time_unit="us")
    )


def deliver(people: pl.DataFrame, *, faults: int) -> pl.DataFrame:
    """A year's delivery: the people as published, and the planted faults behind them."""
    published = people.select(
        "person_id", *ATTRIBUTES, "surveyed_at", published_at=pl.col("surveyed_at") + PUBLISHED_AFTER
    )
    return pl.concat([published, plant(published.head(faults))])


def plant(rows: pl.DataFrame) -> pl.DataFrame:
    """Faulty copies of rows, in turn: a negative age, no schooling, a survey day in the far future."""
    kind = pl.int_range(pl.len()) % 3
    return rows.with_columns(
        person_id=FIRST_FAULT_ID + pl.col("person_id"),
        AGEP=pl.when(kind == 0).then(-1.0).otherwise("AGEP"),
        SCHL=pl.when(kind == 1).then(None).otherwise("SCHL"),
        surveyed_at=pl.when(kind == 2)
        .then(pl.datetime(2099, 1, 1, time_unit="us", time_zone="UTC"))
        .otherwise("surveyed_at"),
    )


def outcomes(people: pl.DataFrame) -> pl.DataFrame:
    """When each outcome became known: AGEP, SCHL, employed, surveyed_at, known_at."""
    late = _scatter(people["person_id"], salt=3) < LATE_SHARE
    extra = 20 + (_scatter(people["person_id"], salt=4) * 40).astype(np.int64)
    delay = pl.lit(pl.Series(OUTCOME_AFTER_DAYS + np.where(late, extra, 0)))
    return people.select(
        "AGEP", "SCHL", "employed", "surveyed_at", known_at=pl.col("surveyed_at") + pl.duration(days=delay)
    )


def entities(people: pl.DataFrame) -> pl.DataFrame:
    """Whom to score or train on: person_id, event_timestamp (a week after the survey), employed."""
    week = dt.timedelta(days=7)
    return people.select("person_id", event_timestamp=pl.col("surveyed_at") + week, employed="employed")


def _packaged() -> Path:
    """NannyML's data folder; found without importing NannyML, which takes seconds."""
    spec = find_spec("nannyml")
    if spec is None or spec.origin is None:
        raise SourceError("NannyML is not installed: the census tables ship in its wheel.")
    return Path(spec.origin).parent / "datasets" / "data"


def _read(path: Path) -> pl.DataFrame:
    frame = pl.read_parquet(path)
    codes = [name for name in frame.columns if isinstance(frame.schema[name], pl.Categorical | pl.Enum)]
    return frame.with_columns(pl.col(codes).cast(pl.String))


def _scatter(ids: pl.Series, *, salt: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Numbers in [0, 1) that depend on nothing but the id (Weyl sequence on mixed ids)."""
    mixed = (ids.to_numpy().astype(np.uint64) + np.uint64(salt * 7919)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) / 2.0**53)


if __name__ == "__main__":
    main()
