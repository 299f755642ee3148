"""`python -m feature_jobs.census.source`: write the census as deliveries of a statistical office, one set per year.

The people are real: public records of the American Community Survey for Massachusetts, which are part of NannyML's
wheel. The records have no times, so this module generates them: the day a person was surveyed, when the office
published the record, and when the outcome became known. Monthly cohort rates are computed from the real outcomes.

A few rows of each delivery are faulty on purpose, with ids that no real person has, so that quarantine has rows.
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
"""Columns of a person."""
NUM_FAULTS = 25
FIRST_FAULT_ID = 1_000_000_000
"""Added to the ids of faulty rows. No real person has such an id."""
LAST_DAY = 350
"""Last survey day of a year, in mid December, so that all people of a year are published in that year."""
PUBLISHED_AFTER = dt.timedelta(days=2)
"""Time from the survey to the publication."""
OUTCOME_AFTER_DAYS = 10
"""Days from the survey until the outcome is known."""
LATE_SHARE = 0.15
"""Share of outcomes that become known 20 to 60 days later than the others."""


@dataclass(kw_only=True, slots=True)
class SourceConfig(PlatformConfig):
    """Configuration of the census source."""

    years: list[int] = field(default_factory=lambda: [2015, 2016, 2017, 2018])
    """Years to write."""
    faults: int = NUM_FAULTS
    """Number of faulty rows in each year's delivery of people."""
    folder: str = "data/census"
    """Output folder. It is outside the storage root: a source is another system, and its files are not encrypted."""


@job("census_source", SourceConfig)
def main(config: SourceConfig) -> None:
    """Write the deliveries of each year."""
    folder = resolve(config.folder)
    census = records()
    all_outcomes = outcomes(census)
    for year in config.years:
        people = census.filter(pl.col("year") == year)
        delivery = deliver(people, faults=config.faults)
        write_parquet(delivery.to_arrow(), f"{folder}/person_{year}.parquet")
        rates = publications(all_outcomes, year=year)
        write_parquet(rates.to_arrow(), f"{folder}/cohort_{year}.parquet")
        write_parquet(entities(people).to_arrow(), f"{folder}/entities_{year}.parquet")
        print(f"{year}: {delivery.height} people, {rates.height} cohort rates", flush=True)


def records() -> pl.DataFrame:
    """Return every real record with its outcome and a generated survey time.

    Columns: person_id, the attributes (codes as text), employed (0 or 1), year, surveyed_at.
    """
    folder = _data_folder()
    reference = _read(folder / "employment_MA_reference.pq")
    later = _read(folder / "employment_MA_analysis.pq").join(
        _read(folder / "employment_MA_analysis_target.pq"), on="id", how="inner"
    )
    columns = ["id", *ATTRIBUTES, "employed", "year"]
    people = pl.concat([reference.select(columns), later.select(columns)])
    days = pl.lit(pl.Series((_hash_to_unit(people["id"], salt=1) * LAST_DAY).astype(np.int64)))
    seconds = pl.lit(pl.Series((_hash_to_unit(people["id"], salt=2) * 86_400).astype(np.int64)))
    start = pl.datetime(pl.col("year"), 1, 1, time_unit="us", time_zone="UTC")
    return people.rename({"id": "person_id"}).with_columns(
        surveyed_at=start + pl.duration(days=days, seconds=seconds, time_unit="us")
    )


def deliver(people: pl.DataFrame, *, faults: int) -> pl.DataFrame:
    """Return a year's delivery: the published people, followed by faulty rows.

    Args:
        people: Rows of `records`.
        faults: Number of faulty rows.
    """
    published = people.select(
        "person_id", *ATTRIBUTES, "surveyed_at", published_at=pl.col("surveyed_at") + PUBLISHED_AFTER
    )
    return pl.concat([published, faulty_copies(published.head(faults))])


def faulty_copies(rows: pl.DataFrame) -> pl.DataFrame:
    """Return a faulty copy of each row: in turn a negative age, a null schooling, or a survey time in the year 2099."""
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
    """Return the outcome of each person, and when it became known.

    Columns: AGEP, SCHL, employed, surveyed_at, known_at.
    """
    is_late = _hash_to_unit(people["person_id"], salt=3) < LATE_SHARE
    extra_days = 20 + (_hash_to_unit(people["person_id"], salt=4) * 40).astype(np.int64)
    delay = pl.lit(pl.Series(OUTCOME_AFTER_DAYS + np.where(is_late, extra_days, 0)))
    return people.select(
        "AGEP", "SCHL", "employed", "surveyed_at", known_at=pl.col("surveyed_at") + pl.duration(days=delay)
    )


def entities(people: pl.DataFrame) -> pl.DataFrame:
    """Return entity rows for training and scoring: person_id, event_timestamp (a week after the survey), employed."""
    week = dt.timedelta(days=7)
    return people.select("person_id", event_timestamp=pl.col("surveyed_at") + week, employed="employed")


def _data_folder() -> Path:
    """Return NannyML's data folder, without importing NannyML, which takes seconds."""
    spec = find_spec("nannyml")
    if spec is None or spec.origin is None:
        raise SourceError("NannyML is not installed. Install it: its wheel contains the census tables.")
    return Path(spec.origin).parent / "datasets" / "data"


def _read(path: Path) -> pl.DataFrame:
    frame = pl.read_parquet(path)
    codes = [name for name in frame.columns if isinstance(frame.schema[name], pl.Categorical | pl.Enum)]
    return frame.with_columns(pl.col(codes).cast(pl.String))


def _hash_to_unit(ids: pl.Series, *, salt: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return numbers in [0, 1) that depend only on the id and the salt (Weyl sequence on mixed ids)."""
    mixed = (ids.to_numpy().astype(np.uint64) + np.uint64(salt * 7919)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) / 2.0**53)


if __name__ == "__main__":
    main()
