"""The driver's side of the network: shape from the data, Ray Train for the fitting, export of what came out."""

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
from cluster.runtime import Precision, Task
from cluster.runtime.signature import WEIGHTS_FILE
from cluster.runtime.tabular_network import NetworkShape
from jobs.train.data import Dataset
from jobs.train.families import FitContext
from jobs.train.progress import shown
from jobs.train.tabular_network.export import export
from jobs.train.tabular_network.loop import METRIC, steps_per_epoch, train_loop

MAX_BATCH, MIN_BATCH = 1024, 16
MIN_STEPS = 16
"""Of an epoch, where the batch is sized by the data."""
FEW_STEPS = 4
"""Of an epoch, below which a configured batch size is warned of."""


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
    """Rows a step over all workers together; none sizes it by the rows to fit on, see `rows_per_step`."""
    precision: Precision = Precision.float32
    """Of the layers' weights as they are registered and served; training is in float32."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "embedding_dim", "epochs", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"model.learning_rate must lie between 0 and 1, got {self.learning_rate}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"model.weight_decay must be finite and not negative, got {self.weight_decay}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must lie between 0 and 1, got {self.dropout}.")


def fit(dataset: Dataset, parameters: Parameters, context: FitContext) -> None:
    """Train over the workers, then write ONNX and safetensors."""
    # Ray Train looks at its workers every two seconds by itself, and each epoch's report waits for that look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    shape = network_shape(dataset, parameters)
    num_workers = context.scaling.num_workers
    print(describe_steps(dataset, parameters, num_workers=num_workers), flush=True)
    with shown(unit="epoch", total=parameters.epochs) as reports:
        result = run(trainer(dataset, parameters, shape, context, num_workers=num_workers, reports=reports))
    best = result.get_best_checkpoint(METRIC, "min")
    if best is None:
        raise RuntimeError("Training ended without a checkpoint.")
    with best.as_directory() as folder:
        export(shape, Path(folder) / WEIGHTS_FILE, context.folder, sample=dataset.matrix[:64])


def run(prepared: TorchTrainer) -> Any:
    """Fit; gives Ray Train's result.

    Raises:
        TrainingFailed: the fit diverged.
    """
    result: Any = prepared.fit()
    if result.return_value is not None:
        raise TrainingFailed(str(result.return_value))
    return result


def trainer(
    dataset: Dataset,
    parameters: Parameters,
    shape: NetworkShape,
    context: FitContext,
    *,
    num_workers: int,
    callbacks: list[Any] | None = None,
    reports: Queue | None = None,
) -> TorchTrainer:
    """The Ray Train trainer of one run.

    Args:
        dataset: what is learned.
        parameters: of the network and its optimizer.
        shape: of the network.
        context: a worker's resources, DeepSpeed stage, where checkpoints go.
        num_workers: processes that train.
        callbacks: of Ray Train, a sweep's for one.
        reports: gets the losses of each epoch.
    """
    scaling = context.scaling
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    return TorchTrainer(
        cast(Any, train_loop),  # declared as a function without a result, and its result is used
        train_loop_config=loop_config(dataset, parameters, shape, context) | {"reports": reports},
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=context.run_name,
            storage_path=context.runs,
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=METRIC, checkpoint_score_order="min"
            ),
            callbacks=callbacks,
        ),
    )


def loop_config(
    dataset: Dataset, parameters: Parameters, shape: NetworkShape, context: FitContext
) -> dict[str, Any]:
    """What every training process is told; the rows are in Ray's object store."""
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
    """The batch size: as configured, else a power of two that gives an epoch at least `MIN_STEPS` steps.

    A network that takes one step an epoch learns next to nothing, so small data sets get small batches.
    """
    if parameters.batch_size is not None:
        return parameters.batch_size
    wanted = int(dataset.fit.sum()) // MIN_STEPS
    return min(MAX_BATCH, max(MIN_BATCH, 1 << max(0, wanted.bit_length() - 1)))


def describe_steps(dataset: Dataset, parameters: Parameters, *, num_workers: int) -> str:
    """How much a fit does, as lines for people; with a warning where that is too little.

    Raises:
        ConfigError: there are fewer rows than workers.
    """
    rows, batch = int(dataset.fit.sum()), rows_per_step(dataset, parameters)
    if rows < num_workers:
        raise ConfigError(
            f"{num_workers} workers cannot share {rows} rows to fit on. Set scaling.num_workers=1."
        )
    steps = steps_per_epoch(rows, batch_size=batch, workers=num_workers)
    said = (
        f"fitting a network on {num_workers} workers: {parameters.epochs} epochs of {steps} steps of {batch} rows "
        f"({rows} rows to fit on)"
    )
    if steps >= FEW_STEPS or parameters.batch_size is None:
        return said
    return f"{said}\nwarning: model.batch_size={batch} leaves {steps} steps an epoch; lower it or raise model.epochs"


def network_shape(dataset: Dataset, parameters: Parameters) -> NetworkShape:
    """The network's shape, with means and scales of the rows to fit on."""
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
    """The target as the loss takes it, float32 [rows]."""
    return ((dataset.target - shape.target_mean) / shape.target_scale).astype(np.float32)
