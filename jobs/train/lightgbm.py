"""The LightGBM family: gradient-boosted trees (Ke et al. 2017), fitted in one Ray task with early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightgbm
import ray
from lightgbm.callback import CallbackEnv
from ray.util.queue import Queue

from cluster.errors import TrainingFailed
from cluster.placement import options
from cluster.runtime import Task
from cluster.runtime.signature import LIGHTGBM_FILE
from jobs.train.data import Dataset
from jobs.train.families import FitContext
from jobs.train.progress import LINES, Report, display_progress, divergence_message, send_report

_VALIDATION = "validation"


@dataclass(kw_only=True, slots=True)
class Parameters:
    """Hyper-parameters. Most of them have LightGBM's names."""

    learning_rate: float = 0.05
    num_leaves: int = 31
    min_data_in_leaf: int = 40
    feature_fraction: float = 0.8
    bagging_fraction: float = 0.9
    lambda_l2: float = 1.0
    cat_smooth: float = 10.0
    rounds: int = 600
    """Largest number of boosting rounds. Early stopping usually ends the fit before this number is reached."""
    patience: int = 30
    """Early stopping ends the fit when the validation loss has not improved for this many rounds."""
    num_threads: int = 2

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.patience < 1:
            raise ValueError("model.rounds and model.patience must be at least 1.")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"model.learning_rate must be between 0 and 1, got {self.learning_rate}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Result of the Ray task that fits the trees."""

    text: str
    """The trees in LightGBM's text format."""
    best_round: int
    """Round with the best validation loss."""
    loss: str
    """Name and value of the best validation loss."""


def fit(dataset: Dataset, parameters: Parameters, context: FitContext) -> None:
    """Fit the trees and write them to the model folder in LightGBM's text format."""
    print(f"fitting trees: at most {parameters.rounds} rounds, patience {parameters.patience}", flush=True)
    remote = _fit.options(num_cpus=parameters.num_threads, **options(context.selector))
    with display_progress(unit="round", total=parameters.rounds) as reports:
        fitted = ray.get(remote.remote(dataset, parameters, context.seed, reports))
    print(f"fitted: the best round is {fitted.best_round}, {fitted.loss}", flush=True)
    (context.folder / LIGHTGBM_FILE).write_text(fitted.text)


@ray.remote
def _fit(dataset: Dataset, parameters: Parameters, seed: int, reports: Queue | None) -> Fitted:
    train = lightgbm.Dataset(
        dataset.matrix[dataset.fit],
        dataset.target[dataset.fit],
        categorical_feature=dataset.signature.categorical,
    )
    validation = train.create_valid(dataset.matrix[dataset.validation], dataset.target[dataset.validation])
    try:
        booster = lightgbm.train(
            _settings(dataset, parameters, seed),
            train,
            num_boost_round=parameters.rounds,
            valid_sets=[validation],
            valid_names=[_VALIDATION],
            callbacks=[
                _report_rounds(reports, every=max(1, parameters.rounds // LINES)),
                lightgbm.early_stopping(parameters.patience, verbose=False),
            ],
        )
    except lightgbm.basic.LightGBMError as error:
        message = str(error).partition(" at /")[0]  # the rest is a line number in LightGBM's own source
        raise TrainingFailed(f"LightGBM refuses these parameters or rows: {message}.") from error
    ((name, loss),) = booster.best_score[_VALIDATION].items()
    return Fitted(
        text=str(booster.model_to_string(num_iteration=booster.best_iteration)),
        best_round=booster.best_iteration,
        loss=f"{_VALIDATION} {name} {loss:.4f}",
    )


def _settings(dataset: Dataset, parameters: Parameters, seed: int) -> dict[str, Any]:
    """Return the settings in LightGBM's format."""
    return {
        **_objective(dataset),
        "learning_rate": parameters.learning_rate,
        "num_leaves": parameters.num_leaves,
        "min_data_in_leaf": parameters.min_data_in_leaf,
        "feature_fraction": parameters.feature_fraction,
        "bagging_fraction": parameters.bagging_fraction,
        "bagging_freq": 1,
        "lambda_l2": parameters.lambda_l2,
        "cat_smooth": parameters.cat_smooth,
        "num_threads": parameters.num_threads,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }


def _report_rounds(reports: Queue | None, *, every: int) -> Callable[[CallbackEnv], None]:
    """Return a callback that sends a report every `every` rounds, and ends the fit if a loss is NaN or infinite."""

    def after_round(env: CallbackEnv) -> None:
        completed = env.iteration + 1
        losses = {f"{data} {name}": float(loss) for data, name, loss, *_ in env.evaluation_result_list or ()}
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise TrainingFailed(divergence_message(f"{name} loss", loss, f"round {completed}"))
        if reports is not None and (completed == 1 or completed % every == 0):
            send_report(reports, Report(completed=completed, losses=losses))

    return after_round


def _objective(dataset: Dataset) -> dict[str, str | int]:
    match dataset.signature.task:
        case Task.binary:
            return {"objective": "binary"}
        case Task.multiclass:
            return {"objective": "multiclass", "num_class": dataset.signature.num_scores}
        case Task.regression:
            return {"objective": "regression"}
