"""The tabular network family, in the driver: derive the network's shape, fit with Ray Train, export the best epoch."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from cluster.errors import ConfigError, TrainingFailed
from cluster.placement import options
from cluster.runtime import Precision, Task
from cluster.runtime.signature import WEIGHTS_FILE
from cluster.runtime.tabular_network import NetworkShape
from jobs.train.data import Dataset
from jobs.train.families import FitContext
from jobs.train.progress import display_progress
from jobs.train.tabular_network.export import export
from jobs.train.tabular_network.loop import METRIC, steps_per_epoch, train_loop

MAX_BATCH, MIN_BATCH = 1024, 16
"""Bounds of the automatic batch size, in rows."""
MIN_STEPS = 16
"""The automatic batch size gives an epoch at least this many steps, if `MIN_BATCH` allows that."""
FEW_STEPS = 4
"""If a configured batch size gives an epoch fewer steps than this, a warning is printed."""


@dataclass(kw_only=True, slots=True)
class Parameters:
    """Hyper-parameters of the network."""

    learning_rate: float = 0.004
    width: int = 128
    depth: int = 2
    embedding_dim: int = 8
    dropout: float = 0.1
    weight_decay: float = 0.01
    epochs: int = 8
    batch_size: int | None = None
    """Rows per step, of all workers together. None derives it from the number of rows, see `rows_per_step`."""
    precision: Precision = Precision.float32
    """Precision of the weights that are registered and served. Training always uses float32."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "embedding_dim", "epochs", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"model.learning_rate must be between 0 and 1, got {self.learning_rate}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"model.weight_decay must be finite and not negative, got {self.weight_decay}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be between 0 and 1, got {self.dropout}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkFit:
    """The inputs of one fit of a network."""

    dataset: Dataset
    parameters: Parameters
    shape: NetworkShape
    context: FitContext


def prepare_fit(dataset: Dataset, parameters: Parameters, context: FitContext) -> NetworkFit:
    """Derive the network's shape, and return it with the other inputs of the fit."""
    shape = network_shape(dataset, parameters)
    return NetworkFit(dataset=dataset, parameters=parameters, shape=shape, context=context)


def fit(dataset: Dataset, parameters: Parameters, context: FitContext) -> None:
    """Train on the workers, then write the best epoch as ONNX and safetensors files."""
    # Each epoch's report waits for Ray Train's next health check. By default, health checks are two seconds apart.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    network_fit = prepare_fit(dataset, parameters, context)
    num_workers = context.scaling.num_workers
    print(describe_steps(dataset, parameters, num_workers=num_workers), flush=True)
    with display_progress(unit="epoch", total=parameters.epochs) as reports:
        result = run_trainer(build_trainer(network_fit, num_workers=num_workers, reports=reports))
    best = result.get_best_checkpoint(METRIC, "min")
    if best is None:
        raise RuntimeError("Training ended without a checkpoint.")
    with best.as_directory() as folder:
        export(network_fit.shape, Path(folder) / WEIGHTS_FILE, context.folder, sample=dataset.matrix[:64])


def run_trainer(trainer: TorchTrainer) -> Any:
    """Run the trainer and return Ray Train's result.

    Raises:
        TrainingFailed: The fit diverged.
    """
    result: Any = trainer.fit()
    if result.return_value is not None:
        raise TrainingFailed(str(result.return_value))
    return result


def build_trainer(
    network_fit: NetworkFit,
    *,
    num_workers: int,
    callbacks: list[Any] | None = None,
    reports: Queue | None = None,
) -> TorchTrainer:
    """Return the Ray Train trainer of one fit.

    Args:
        network_fit: Data, parameters, shape and context of the fit.
        num_workers: Number of training processes.
        callbacks: Ray Train callbacks, for example to report a sweep's metrics to Tune.
        reports: Queue that gets the losses of each epoch.
    """
    context, scaling = network_fit.context, network_fit.context.scaling
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    return TorchTrainer(
        cast(Any, train_loop),  # by Ray's types it returns nothing, but Ray does pass its value on
        train_loop_config=loop_config(network_fit) | {"reports": reports},
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
            # All on one node, because they exchange gradients over connections that are not encrypted.
            placement_strategy="STRICT_PACK",
            **options(context.selector),  # type: ignore[arg-type]
        ),
        run_config=RunConfig(
            name=context.run_name,
            storage_path=context.runs,
            storage_filesystem=context.file_system,
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=METRIC, checkpoint_score_order="min"
            ),
            callbacks=callbacks,
        ),
    )


def loop_config(network_fit: NetworkFit) -> dict[str, Any]:
    """Return the configuration of every training process, and put the rows into Ray's object store."""
    dataset, parameters = network_fit.dataset, network_fit.parameters
    shape, context = network_fit.shape, network_fit.context
    target = scaled_target(dataset, shape)
    data = {
        "fit": (dataset.matrix[dataset.fit], target[dataset.fit]),
        "validation": (dataset.matrix[dataset.validation], target[dataset.validation]),
    }
    return {
        "data": ray.put(data),
        "shape": asdict(shape),
        "parameters": asdict(parameters) | {"batch_size": rows_per_step(dataset, parameters)},
        "deepspeed": asdict(context.deepspeed),
        "seed": context.seed,
        "device": "cuda" if context.scaling.gpus_per_worker else "cpu",
    }


def rows_per_step(dataset: Dataset, parameters: Parameters) -> int:
    """Return the configured batch size. If it is None, derive a power of two between `MIN_BATCH` and `MAX_BATCH`.

    Small data sets get small batches, so that an epoch has at least `MIN_STEPS` steps if possible. With one step per
    epoch, a network learns almost nothing.
    """
    if parameters.batch_size is not None:
        return parameters.batch_size
    largest = int(dataset.fit.sum()) // MIN_STEPS
    return min(MAX_BATCH, max(MIN_BATCH, 1 << max(0, largest.bit_length() - 1)))


def describe_steps(dataset: Dataset, parameters: Parameters, *, num_workers: int) -> str:
    """Describe the number of epochs, steps and rows of a fit, with a warning if there are too few steps.

    Raises:
        ConfigError: There are fewer rows than workers.
    """
    rows, batch = int(dataset.fit.sum()), rows_per_step(dataset, parameters)
    if rows < num_workers:
        raise ConfigError(
            f"{num_workers} workers are too many for {rows} rows to fit on. Set scaling.num_workers=1."
        )
    steps = steps_per_epoch(rows, batch_size=batch, workers=num_workers)
    description = (
        f"fitting a network on {num_workers} workers: {parameters.epochs} epochs of {steps} steps of {batch} rows "
        f"({rows} rows to fit on)"
    )
    if steps >= FEW_STEPS or parameters.batch_size is None:
        return description
    return (
        f"{description}\nwarning: model.batch_size={batch} gives only {steps} steps per epoch; lower it or raise "
        "model.epochs"
    )


def network_shape(dataset: Dataset, parameters: Parameters) -> NetworkShape:
    """Return the network's shape, with the means and scales of the rows to fit on."""
    signature = dataset.signature
    categorical, columns = signature.categorical, signature.matrix_columns
    numeric = [i for i in range(signature.width) if i not in categorical]
    # In float64, because the sum of large float32 values overflows.
    numbers = dataset.matrix[dataset.fit][:, numeric].astype(np.float64)
    means = np.nan_to_num(np.nanmean(numbers, axis=0)) if numeric else np.zeros(0)
    spreads = np.nan_to_num(np.nanstd(numbers, axis=0)) if numeric else np.zeros(0)
    target = dataset.target[dataset.fit]
    regression = signature.task is Task.regression
    return NetworkShape(
        task=signature.task.value,
        num_outputs=signature.num_scores,
        categorical=categorical,
        cardinalities=[len(columns[i].categories or ()) for i in categorical],
        numeric=numeric,
        means=[float(value) for value in means],
        scales=[float(value) or 1.0 for value in spreads],
        target_mean=float(target.mean()) if regression else 0.0,
        target_scale=(float(target.std()) or 1.0) if regression else 1.0,
        width=parameters.width,
        depth=parameters.depth,
        embedding_dim=parameters.embedding_dim,
        dropout=parameters.dropout,
    )


def scaled_target(dataset: Dataset, shape: NetworkShape) -> Any:
    """Return the target in the form that the loss needs. For a regression, it is standardised, float32 [rows]."""
    return ((dataset.target - shape.target_mean) / shape.target_scale).astype(np.float32)
