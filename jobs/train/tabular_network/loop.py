"""Training loop of one process. DeepSpeed trains on the part of the rows that belongs to this rank.

DeepSpeed is imported inside the function that needs it, because its import compiles code and probes the hardware.
ZeRO's collective operations wait for all ranks. So every rank makes the same number of steps, and saves its own shard.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.util.queue import Queue
from safetensors.torch import save_file

from cluster.errors import TrainingFailed
from cluster.runtime import Task
from cluster.runtime.signature import WEIGHTS_FILE
from cluster.runtime.tabular_network import NetworkShape, TabularNetwork
from cluster.security.encryption.scratch import memory_folder, scratch_directory
from jobs.train.progress import Report, divergence_message, send_report

WARMUP_SHARE = 0.1
"""The learning rate rises during this share of all steps."""
METRIC = "validation_loss"
"""Metric that selects the best epoch and the best trial."""
TRAINING_LOSS = "training_loss"


def train_loop(config: dict[str, Any]) -> str | None:
    """Fit a network as one of Ray Train's workers. After each epoch, save a checkpoint with the consolidated weights.

    Returns:
        None, or the reason why the fit diverged. A raised error would make Ray Train try the same fit again.
    """
    context = ray.train.get_context()
    rank = context.get_world_rank()
    reports: Queue | None = config["reports"] if rank == 0 else None

    def after_epoch(engine: Any, metrics: dict[str, Any]) -> None:
        if reports is not None:
            losses = {name: metrics[name] for name in (TRAINING_LOSS, METRIC)}
            send_report(reports, Report(completed=metrics["epoch"] + 1, losses=losses))
        _save_and_report(engine, metrics, rank)

    try:
        fit_network(
            config,
            rank=rank,
            workers=context.get_world_size(),
            resume=ray.train.get_checkpoint(),
            after_epoch=after_epoch,
        )
    except TrainingFailed as error:
        return str(error)
    return None


def fit_alone(config: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Fit a network in this process only, without checkpoints.

    Args:
        config: Configuration from `loop_config`.
        report: Called with the metrics of each epoch.
    """
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed needs it even with one process
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fit_network(
            config, rank=0, workers=1, resume=None, after_epoch=lambda engine, metrics: report(metrics)
        )
    finally:
        torch.distributed.destroy_process_group()


def fit_network(
    config: dict[str, Any],
    *,
    rank: int,
    workers: int,
    resume: ray.train.Checkpoint | None,
    after_epoch: Callable[[Any, dict[str, Any]], None],
) -> None:
    """Fit a network on the part of the rows that belongs to this rank.

    Args:
        config: Configuration from `loop_config`.
        rank: Rank of this process.
        workers: Number of processes.
        resume: Checkpoint of a failed attempt to continue from, or None.
        after_epoch: Called with the engine and the metrics after each epoch.

    Raises:
        TrainingFailed: A loss is NaN or infinite. All ranks have the same losses, so all ranks raise this error.
    """
    import deepspeed

    if config["device"] == "cpu":
        # DeepSpeed's shared-memory all-reduce is only for inference, and compiling it takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    shape = NetworkShape(**config["shape"])
    parameters = config["parameters"]
    data = ray.get(config["data"])
    inputs, target = (torch.tensor(part) for part in data["fit"])
    rows_per_step = max(1, parameters["batch_size"] // workers)
    steps = steps_per_epoch(len(inputs), batch_size=parameters["batch_size"], workers=workers)
    engine, *_ = deepspeed.initialize(
        model=TabularNetwork(shape), config=deepspeed_config(config, rows_per_step), dist_init_required=False
    )
    for epoch in range(_first_epoch(engine, resume), parameters["epochs"]):
        order = np.random.default_rng([config["seed"], epoch]).permutation(len(inputs))[rank::workers]
        engine.train()
        total = torch.zeros((), device=engine.device)
        for step in range(steps):
            rows = order[step * rows_per_step : (step + 1) * rows_per_step]
            progress = (epoch * steps + step) / (parameters["epochs"] * steps)
            _set_learning_rate(engine, parameters["learning_rate"], progress)
            scores = engine(inputs[rows].to(engine.device))
            step_loss = loss(scores, target[rows].to(engine.device), Task(shape.task))
            total += step_loss.detach()
            engine.backward(step_loss)
            engine.step()
        torch.distributed.all_reduce(total)
        losses = {
            TRAINING_LOSS: float(total) / (steps * workers),
            METRIC: _validation_loss(engine, Task(shape.task), data["validation"]),
        }
        _require_finite(losses, when=f"epoch {epoch + 1} of {parameters['epochs']}")
        after_epoch(engine, losses | {"epoch": epoch})


def _require_finite(losses: dict[str, float], *, when: str) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            raise TrainingFailed(divergence_message(name.replace("_", " "), value, when))


def steps_per_epoch(rows: int, *, batch_size: int, workers: int) -> int:
    """Return the number of steps of an epoch. It is the same for every rank.

    If the last rows are too few for a step, they are skipped. Each epoch shuffles the rows and so skips other rows.
    """
    return max(1, rows // (max(1, batch_size // workers) * workers))


def deepspeed_config(config: dict[str, Any], rows_per_step: int) -> dict[str, Any]:
    """Return the configuration for DeepSpeed."""
    parameters, settings = config["parameters"], config["deepspeed"]
    return {
        "train_micro_batch_size_per_gpu": rows_per_step,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": settings["zero_stage"]},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": parameters["learning_rate"],
                "weight_decay": parameters["weight_decay"],
                "torch_adam": settings["torch_adam"],
            },
        },
        "steps_per_print": 10**9,
    }


def learning_rate(peak: float, progress: float) -> float:
    """Return the learning rate: a linear warm-up, then half a cosine down to zero.

    Args:
        peak: Learning rate at the end of the warm-up.
        progress: Completed share of all steps, 0 to 1.
    """
    if progress < WARMUP_SHARE:
        return peak * (progress / WARMUP_SHARE + 0.01) / 1.01
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)))


def loss(outputs: torch.Tensor, target: torch.Tensor, task: Task) -> torch.Tensor:
    """Return the mean loss of a batch: cross-entropy, or half the squared error of the standardised target."""
    match task:
        case Task.binary:
            return torch.nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), target)
        case Task.multiclass:
            return torch.nn.functional.cross_entropy(outputs, target.to(torch.int64))
        case Task.regression:
            return 0.5 * torch.nn.functional.mse_loss(outputs.squeeze(1), target)


def _set_learning_rate(engine: Any, peak: float, progress: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(peak, progress)


def _first_epoch(engine: Any, resume: ray.train.Checkpoint | None) -> int:
    """Return the first epoch to run: 0, or the epoch after the checkpoint of a failed attempt."""
    if resume is None:
        return 0
    with resume.as_directory() as folder:
        _, state = engine.load_checkpoint(folder)
    return int(state["epoch"]) + 1


def _validation_loss(engine: Any, task: Task, validation: tuple[Any, Any]) -> float:
    engine.eval()
    inputs, target = (torch.tensor(part).to(engine.device) for part in validation)
    with torch.no_grad():
        return float(loss(engine(inputs), target, task))


def _save_and_report(engine: Any, metrics: dict[str, Any], rank: int) -> None:
    on_disk = Path(tempfile.gettempdir()) / f"falaj-runs-{os.geteuid()}"
    with scratch_directory(memory_folder(otherwise=on_disk)) as folder:
        engine.save_checkpoint(str(folder), client_state={"epoch": metrics["epoch"]})
        weights = consolidated_weights(engine)
        if rank == 0:
            save_file(weights, str(folder / WEIGHTS_FILE))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def consolidated_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return all weights of the network on the CPU, whatever the ZeRO stage is. All ranks must call this together."""
    from deepspeed import zero

    with zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
        return {
            name: value.detach().cpu().clone().contiguous()
            for name, value in engine.module.state_dict().items()
        }
