"""What each worker does: DeepSpeed's engine over its share of the rows, a checkpoint of every rank after each epoch.

DeepSpeed is imported here, in the worker: it compiles and probes on import. Every rank makes the same number of steps,
because ZeRO's collectives wait for all.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from safetensors.torch import save_file

from cluster.runtime import Task
from jobs.train.tabular_network.export import WEIGHTS_FILE
from jobs.train.tabular_network.network import NetworkShape, TabularNetwork, loss

WARMUP_SHARE = 0.1


def train_loop(config: dict[str, Any]) -> None:
    """Fit a network; the last checkpoint has its consolidated weights."""
    import deepspeed

    if config["device"] == "cpu":
        # Its shared-memory all-reduce serves inference only, and would be compiled for a minute at first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    shape = NetworkShape(**config["shape"])
    parameters = config["parameters"]
    data = ray.get(config["data"])
    inputs, target = (torch.tensor(part) for part in data["fit"])
    rows_per_step = max(1, parameters["batch_size"] // workers)
    steps = max(1, len(inputs) // (rows_per_step * workers))
    engine, *_ = deepspeed.initialize(
        model=TabularNetwork(shape), config=deepspeed_config(config, rows_per_step), dist_init_required=False
    )
    start = _resume(engine)
    for epoch in range(start, parameters["epochs"]):
        order = np.random.default_rng([config["seed"], epoch]).permutation(len(inputs))[rank::workers]
        engine.train()
        for step in range(steps):
            rows = order[step * rows_per_step : (step + 1) * rows_per_step]
            _set_rate(
                engine, parameters["learning_rate"], (epoch * steps + step) / (parameters["epochs"] * steps)
            )
            value = loss(
                engine(inputs[rows].to(engine.device)), target[rows].to(engine.device), Task(shape.task)
            )
            engine.backward(value)
            engine.step()
        _report(engine, shape, data["validation"], epoch, rank)


def deepspeed_config(config: dict[str, Any], rows_per_step: int) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
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
    """Linear warm-up, then half a cosine down to zero; `progress` runs from 0 to 1."""
    if progress < WARMUP_SHARE:
        return peak * (progress / WARMUP_SHARE + 0.01) / 1.01
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)))


def _set_rate(engine: Any, peak: float, progress: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(peak, progress)


def _resume(engine: Any) -> int:
    """The epoch to start with: after that of the last checkpoint, if a failed attempt left one."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        _, state = engine.load_checkpoint(folder)
    return int(state["epoch"]) + 1


def _report(engine: Any, shape: NetworkShape, validation: tuple[Any, Any], epoch: int, rank: int) -> None:
    engine.eval()
    inputs, target = (torch.tensor(part) for part in validation)
    with torch.no_grad():
        value = float(loss(engine(inputs.to(engine.device)), target.to(engine.device), Task(shape.task)))
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, client_state={"epoch": epoch})
        weights = consolidated(engine)
        if rank == 0:
            save_file(weights, str(Path(folder) / WEIGHTS_FILE))
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"validation_loss": value, "epoch": epoch}, checkpoint=checkpoint)


def consolidated(engine: Any) -> dict[str, torch.Tensor]:
    """The whole network's weights on the CPU, for every ZeRO stage; all ranks must call it."""
    from deepspeed import zero

    with zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
        return {
            name: value.detach().cpu().clone().contiguous()
            for name, value in engine.module.state_dict().items()
        }
