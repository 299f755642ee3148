"""Fit a family once for a sweep: without checkpoints, but with its validation losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from cluster.runtime import Task
from jobs.metrics import score
from jobs.train.data import load_dataset
from jobs.train.families import FitContext, ResolvedFamily
from jobs.train.progress import METRIC, RUNG
from jobs.train.rows.encoded import Part
from jobs.train.training_data import TrainingData, require_room

Report = Callable[[dict[str, Any]], None]
"""Called with the metrics of a trial. They have at least `METRIC`, and for a sweep `RUNG`."""


def fit_trial(
    data: TrainingData,
    family: ResolvedFamily,
    context: FitContext,
    *,
    num_workers: int,
    report: Report,
    worker_callbacks: Sequence[Any] = (),
) -> None:
    """Fit a model, and report its validation loss: a network after each epoch, LightGBM after each segment.

    Args:
        data: The training set.
        family: The family, with the trial's hyper-parameters.
        context: Settings of the fit. Only its folder gets files.
        num_workers: Training workers of a network. 0 trains in this process.
        report: Gets the metrics.
        worker_callbacks: Ray Train callbacks that get the metrics of workers, instead of `report`.

    Raises:
        TrainingFailed: The fit diverged, or the device has too little memory.
    """
    if family.is_network:
        _fit_network(data, family, context, num_workers, report, worker_callbacks)
    elif hasattr(family.module, "fit_trial"):
        family.module.fit_trial(data, family.parameters, context, numbered(report))
    else:
        if hasattr(family.module, "fit_rows"):
            family.module.fit_rows(data, family.parameters, context)
        else:
            require_room(data)
            family.module.fit(load_dataset(data.rows), family.parameters, context)
        report({METRIC: validation_loss(data, context), RUNG: 1})


def numbered(report: Report) -> Report:
    """Return a function that adds the number of the report to its metrics."""
    numbers = itertools.count(1)
    return lambda metrics: report(metrics | {RUNG: next(numbers)})


def num_reports(family: ResolvedFamily) -> int:
    """Return how often a trial reports at most."""
    parameters = family.parameters
    if family.is_network:
        return int(parameters.epochs)
    if hasattr(family.module, "fit_trial") and hasattr(parameters, "segment_rounds"):
        return -(-int(parameters.rounds) // int(parameters.segment_rounds))
    return 1


def trial_cpus(family: ResolvedFamily, *, num_workers: int, cpus_per_worker: float) -> float:
    """Return the logical CPUs of a trial's own process."""
    if family.is_network:
        return 0.5 if num_workers else cpus_per_worker
    return float(getattr(family.parameters, "num_threads", cpus_per_worker))


def validation_loss(data: TrainingData, context: FitContext) -> float:
    """Return the loss of the model in the folder on the validation rows: log loss, or root mean squared error."""
    from jobs.train.run.evaluation import predict_part  # imports ONNX Runtime

    predictions = predict_part(context.folder, data, data.signature, part=Part.validation)
    metrics = score(predictions, data.target[data.validation])
    loss = metrics["rmse" if data.signature.task is Task.regression else "log_loss"]
    return math.nan if loss is None else float(loss)


def _fit_network(
    data: TrainingData,
    family: ResolvedFamily,
    context: FitContext,
    num_workers: int,
    report: Report,
    worker_callbacks: Sequence[Any],
) -> None:
    from jobs.train.network.fit import build_trainer, prepare_fit, run_trainer  # imports torch and Ray Train
    from jobs.train.network.worker import fit_alone

    network_fit = prepare_fit(data, family, context, num_workers=num_workers)
    if not num_workers:
        fit_alone(network_fit.loop_config(), report=report)
        return
    run_trainer(build_trainer(network_fit, num_workers=num_workers, callbacks=list(worker_callbacks)))
