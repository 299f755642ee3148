"""A family of a user's own with `fit`: it gets all rows in memory, and writes a LightGBM model."""

from __future__ import annotations

from dataclasses import dataclass

import lightgbm

from cluster.runtime.signature import LIGHTGBM_FILE
from jobs.train.data import Dataset
from jobs.train.families import FitContext


@dataclass(kw_only=True, slots=True)
class Parameters:
    """Hyper-parameters."""

    rounds: int = 5


def fit(dataset: Dataset, parameters: Parameters, context: FitContext) -> None:
    """Fit trees with LightGBM."""
    rows = lightgbm.Dataset(dataset.matrix[dataset.fit], dataset.target[dataset.fit])
    settings = {"objective": "binary", "verbosity": -1, "num_threads": 1}
    lightgbm.train(settings, rows, parameters.rounds).save_model(context.folder / LIGHTGBM_FILE)
