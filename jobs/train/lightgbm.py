"""The LightGBM family: gradient-boosted trees (Ke et al. 2017), fitted in one Ray task with early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.queue import Queue

from cluster.placement import options
from cluster.runtime import ModelSignature, Task
from cluster.runtime.signature import LIGHTGBM_FILE
from jobs.train.families import FitContext
from jobs.train.memory import run_task
from jobs.train.progress import LINES, METRIC, Report, display_progress, send_report
from jobs.train.rows.encoded import EncodedRows, Part
from jobs.train.run.files import RunFiles
from jobs.train.training_data import TrainingData
from jobs.train.trees.rows import build_dataset
from jobs.train.trees.segments import OnRound, SegmentedFit, SegmentPlan, merge_segments

TOO_LITTLE_MEMORY = (
    "The node that fits the trees has too little memory. They need about one byte for each input of each row. Name "
    "fewer columns with inputs=[…], or choose larger nodes with placement.region."
)


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
    segment_rounds: int = 250
    """Rounds between two checkpoints. It changes the trees of later rounds, because each segment has its own seeds."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.patience, self.segment_rounds) < 1:
            raise ValueError("model.rounds, model.patience and model.segment_rounds must be at least 1.")
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


def fit_rows(data: TrainingData, parameters: Parameters, context: FitContext) -> None:
    """Fit the trees, continuing after the run's last segment, and write them in LightGBM's text format."""
    print(f"fitting trees: at most {parameters.rounds} rounds, patience {parameters.patience}", flush=True)
    remote = _fit.options(num_cpus=parameters.num_threads, max_retries=0, **options(context.selector))
    with display_progress(unit="round", total=parameters.rounds, claim=context.claim) as reports:
        fitted: Fitted = run_task(
            lambda: remote.remote(data.rows, parameters, context.seed, context.files, reports),
            too_little_memory=TOO_LITTLE_MEMORY,
        )
    print(f"fitted: the best round is {fitted.best_round}, {fitted.loss}", flush=True)
    (context.folder / LIGHTGBM_FILE).write_text(fitted.text)


def fit_trial(
    data: TrainingData,
    parameters: Parameters,
    context: FitContext,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Fit the trees in this process, and report the smallest validation loss after each segment."""
    best, rounds = math.inf, 0

    def after_round(completed: int, losses: dict[str, float]) -> None:
        nonlocal best, rounds
        best, rounds = min(best, *losses.values()), completed
        if completed % parameters.segment_rounds == 0:
            report({METRIC: best})

    fit_trees(data.rows, parameters, context.seed, files=None, on_round=after_round)
    if rounds % parameters.segment_rounds:
        report({METRIC: best})


@ray.remote
def _fit(
    rows: EncodedRows,
    parameters: Parameters,
    seed: int,
    files: RunFiles | None,
    reports: Queue | None,
) -> Fitted:
    return fit_trees(
        rows,
        parameters,
        seed,
        files=files,
        on_round=_report_rounds(reports, every=max(1, parameters.rounds // LINES)),
    )


def fit_trees(
    rows: EncodedRows,
    parameters: Parameters,
    seed: int,
    *,
    files: RunFiles | None,
    on_round: OnRound,
) -> Fitted:
    """Fit the trees in this process.

    Args:
        rows: All rows.
        parameters: Hyper-parameters.
        seed: Seed of the run.
        files: Files of the run, for its checkpoints. None keeps none.
        on_round: Called after each round.

    Raises:
        TrainingFailed: A loss is NaN or infinite, or LightGBM refuses the parameters or rows.
    """
    settings = _settings(rows.signature, parameters, seed)
    train = build_dataset(rows, Part.fit, settings=settings)
    validation = build_dataset(rows, Part.validation, settings=settings, reference=train)
    plan = SegmentPlan(
        rounds=parameters.rounds,
        segment_rounds=parameters.segment_rounds,
        patience=parameters.patience,
        seed=seed,
    )
    segments = SegmentedFit(rows, train, validation, settings=settings, plan=plan, files=files).run(on_round)
    last = segments[-1]
    return Fitted(
        text=merge_segments(segments),
        best_round=last.best_round,
        loss=f"{last.loss_name} {last.best_loss:.4f}",
    )


def _settings(signature: ModelSignature, parameters: Parameters, seed: int) -> dict[str, Any]:
    """Return the settings in LightGBM's format."""
    return {
        **_objective(signature),
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
        "force_col_wise": True,  # row by row needs a second copy of the bins
        "verbosity": -1,
    }


def _report_rounds(reports: Queue | None, *, every: int) -> OnRound:
    """Return a function that sends a report every `every` rounds."""

    def after_round(completed: int, losses: dict[str, float]) -> None:
        if reports is not None and (completed == 1 or completed % every == 0):
            send_report(reports, Report(completed=completed, losses=losses))

    return after_round


def _objective(signature: ModelSignature) -> dict[str, str | int]:
    match signature.task:
        case Task.binary:
            return {"objective": "binary"}
        case Task.multiclass:
            return {"objective": "multiclass", "num_class": signature.num_scores}
        case Task.regression:
            return {"objective": "regression"}
