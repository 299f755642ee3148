"""Entry points of a training process: as one of Ray Train's workers, or alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import torch
from ray.util.queue import Queue

from cluster.errors import TrainingFailed
from jobs.train.config import CheckpointConfig
from jobs.train.network.elastic import RESIZED, GrowthWatch, Resized, WorkerRange, free_resources
from jobs.train.network.failures import TOO_LITTLE_MEMORY, is_out_of_memory, report_node
from jobs.train.network.loop import TRAINING_LOSS, Rank, StepMetrics, run_loop
from jobs.train.network.plan import LoopConfig, Steps
from jobs.train.network.saver import NoCheckpoints, Saver
from jobs.train.progress import METRIC, RUNG, Report, send_report
from jobs.train.run.files import RunFiles
from jobs.train.trial_error import without_values


def train_worker(settings: dict[str, Any]) -> str | None:
    """Fit a network as one of Ray Train's workers, and keep the run's checkpoints.

    Args:
        settings: `loop` (reference to a `LoopConfig`), `files` (`RunFiles`; None for a trial), `checkpoint`, `reports`,
            and `workers` (`WorkerRange` or None).

    Returns:
        `RESIZED` if all ranks have ended because there is room for more workers.

    Raises:
        TrainingFailed: The fit diverged, or the device or the node has too little memory.
        RefusedError: An input is refused.
    """
    try:
        return _train(settings)
    except Exception as error:
        if settings["files"] is not None:
            raise
        raise without_values(error) from None


def _train(settings: dict[str, Any]) -> str | None:
    context = ray.train.get_context()
    rank = Rank(rank=context.get_world_rank(), workers=context.get_world_size())
    config: LoopConfig = ray.get(settings["loop"])
    reports: Queue | None = settings["reports"] if rank.rank == 0 else None
    observer = _observer(settings, config, rank, reports)
    if isinstance(observer, Saver):
        report_node()  # a trial of a sweep reports nothing but its metrics
    try:
        run_loop(config, rank, observer)
        if isinstance(observer, Saver):
            observer.close()
    except Resized:
        return RESIZED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingFailed(TOO_LITTLE_MEMORY) from error
    return None


def _observer(
    settings: dict[str, Any], config: LoopConfig, rank: Rank, reports: Queue | None
) -> Saver | NoCheckpoints:
    def report(metrics: StepMetrics, is_epoch: bool) -> None:
        if reports is not None:
            send_report(reports, progress_report(metrics, config.steps, is_epoch=is_epoch))

    files: RunFiles | None = settings["files"]
    if files is None:
        return NoCheckpoints(lambda metrics: ray.train.report(_epoch_metrics(metrics)))
    checkpoint: CheckpointConfig = settings["checkpoint"]
    return Saver(
        files,
        checkpoint,
        rank,
        report=report,
        ask_draining=is_draining,
        has_room=_growth(settings["workers"], rank),
    )


def _growth(workers: WorkerRange | None, rank: Rank) -> Callable[[], bool]:
    """Return a function that tells whether there is room for more workers."""
    if workers is None:
        return lambda: False
    node = ray.get_runtime_context().get_node_id()
    return GrowthWatch(workers, held=rank.workers, node=node, room=lambda: free_resources(workers.selector))


def is_draining() -> bool:
    """Return whether Ray will end a node of this run soon. All ranks call this together."""
    return ray.train.get_preemption_info() is not None


def progress_report(metrics: StepMetrics, steps: Steps, *, is_epoch: bool) -> Report:
    """Return what the driver shows."""
    done = metrics.epoch * steps.steps + metrics.step
    remaining = (steps.total - done) * steps.batch_rows
    return Report(
        completed=metrics.epoch + 1 if is_epoch else metrics.epoch,
        losses={name: metrics.values[name] for name in (TRAINING_LOSS, METRIC) if name in metrics.values},
        is_whole=is_epoch,
        step=f"{metrics.step}/{steps.steps}",
        rows_per_s=metrics.rows_per_s,
        remaining_s=remaining / metrics.rows_per_s if metrics.rows_per_s else None,
    )


def fit_alone(config: LoopConfig, report: Callable[[dict[str, Any]], None]) -> None:
    """Fit a network in this process only, without checkpoints.

    Args:
        config: Configuration of the fit.
        report: Called with the metrics of each epoch.
    """
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed needs it even with one process
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        run_loop(config, Rank(), NoCheckpoints(lambda metrics: report(_epoch_metrics(metrics))))
    finally:
        torch.distributed.destroy_process_group()


def _epoch_metrics(metrics: StepMetrics) -> dict[str, Any]:
    return metrics.values | {RUNG: metrics.epoch + 1}
