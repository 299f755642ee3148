"""The census data from the package NannyML, as frames for the monitor's tests."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl

from cluster.runtime import Task
from jobs.monitor.calculation.drift import measure_drift
from jobs.monitor.calculation.frames import PREDICTED, SCORE, TIME, TRUTH, Frames
from jobs.monitor.calculation.measures import Measures

YEARS = ("2016", "2017", "2018")
MIN_OUTCOMES = 300
CATEGORICAL = ["SCHL", "MAR", "SEX", "DIS"]


def data(name: str) -> Path:
    """Return the path of a file in the package NannyML."""
    return Path(str(resources.files("nannyml") / "datasets" / "data" / name))


def census_frames() -> Frames:
    """Return NannyML's frames with its model's predictions: held-out people of 2015, and 4,000 of each later year."""
    reference = pl.read_parquet(data("employment_MA_reference.pq")).filter(pl.col("id") % 4 == 3)
    later = pl.read_parquet(data("employment_MA_analysis.pq")).join(
        pl.read_parquet(data("employment_MA_analysis_target.pq")), on="id"
    )
    served = pl.concat(later.filter(pl.col("year") == int(year)).sample(4000, seed=1) for year in YEARS)
    return Frames(
        task=Task.binary,
        reference=_census(reference, days(reference.height, chunks=10)),
        served=_census(served, days(served.height, chunks=3)),
        chunks=list(YEARS),
        continuous=["AGEP"],
        categorical=CATEGORICAL,
    )


def days(rows: int, *, chunks: int) -> pd.DatetimeIndex:
    """Return the artificial day of each row. All chunks have the same size."""
    return pd.Timestamp("2000-01-01") + pd.to_timedelta(np.arange(rows) * chunks // rows, unit="D")


def _census(rows: pl.DataFrame, times: pd.DatetimeIndex) -> pd.DataFrame:
    frame = rows.select("AGEP", pl.col(CATEGORICAL).cast(pl.String)).to_pandas()
    return frame.assign(
        **{
            TIME: times,
            TRUTH: rows["employed"].to_numpy(),
            PREDICTED: rows["prediction"].to_numpy(),
            SCORE: rows["predicted_probability"].to_numpy(),
        }
    )


def of_2018(frames: Frames) -> pd.Series:
    """Return the mask that selects the served rows of 2018."""
    return frames.served[TIME] == pd.Timestamp("2000-01-03")


def distances(frames: Frames) -> dict[str, Measures]:
    """Return the drift distances by column and chunk."""
    return {name: figure.measures for name, figure in measure_drift(frames).items()}
