"""Fit a network in the driver: start Ray Train's workers, and export the best epoch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Queue
from safetensors.torch import load

from cluster.placement import options
from cluster.runtime.encoding import Matrix
from jobs.train.families import FitContext, ResolvedFamily
from jobs.train.memory import MAX_RESTARTS
from jobs.train.network.elastic import WorkerRange, free_resources, run_elastic
from jobs.train.network.failures import EndOfHopelessRuns, reason_of
from jobs.train.network.plan import LoopConfig, Steps, describe_steps, plan_steps
from jobs.train.network.protocol import export_network, network_signature
from jobs.train.network.worker import train_worker
from jobs.train.progress import display_progress
from jobs.train.rows.batches import TableBatches
from jobs.train.rows.encoded import Part
from jobs.train.run.files import best_path, newest_complete
from jobs.train.training_data import TrainingData

SAMPLE_ROWS = 64
"""Rows on which an exported graph is compared with its network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkFit:
    """The inputs of one fit of a network."""

    signature: Any
    """What the family's `build` and `loss` get."""
    batches: Any
    """See `LoopConfig.batches`."""
    num_rows: int
    """Rows to fit on."""
    family: ResolvedFamily
    steps: Steps
    context: FitContext

    def loop_config(self) -> LoopConfig:
        """Return the configuration of every training process."""
        context = self.context
        return LoopConfig(
            module=self.family.module.__name__,
            parameters=self.family.parameters,
            signature=self.signature,
            batches=self.batches,
            steps=self.steps,
            deepspeed=context.deepspeed,
            seed=context.seed,
            device="cuda" if context.scaling.gpus_per_worker else "cpu",
            log_every=context.checkpoint.log_every,
        )


def prepare_fit(
    data: TrainingData, family: ResolvedFamily, context: FitContext, *, num_workers: int | list[int]
) -> NetworkFit:
    """Plan the steps of a fit to a training set.

    Args:
        data: The training set.
        family: The family.
        context: Settings of the fit.
        num_workers: Number of workers, or the smallest and the largest one. Each of them must divide the batch.

    Raises:
        ConfigError: There are fewer rows than workers, or the workers do not divide the batch.
    """
    return plan_fit(
        family,
        context,
        signature=network_signature(data),
        batches=TableBatches(rows=data.rows),
        num_rows=int(data.fit.sum()),
        num_workers=num_workers,
    )


def plan_fit(
    family: ResolvedFamily,
    context: FitContext,
    *,
    signature: Any,
    batches: Any,
    num_rows: int,
    num_workers: int | list[int],
) -> NetworkFit:
    """Plan the steps of a fit to any rows. For arguments see `NetworkFit`, for errors `prepare_fit`."""
    numbers = num_workers if isinstance(num_workers, list) else [num_workers]
    steps = plan_steps(
        num_rows,
        family.parameters,
        workers=[max(1, number) for number in numbers],
        accumulation=context.deepspeed.gradient_accumulation,
    )
    return NetworkFit(
        signature=signature, batches=batches, num_rows=num_rows, family=family, steps=steps, context=context
    )


def fit_network(data: TrainingData, family: ResolvedFamily, context: FitContext) -> None:
    """Train on the workers, continuing from the run's last checkpoint, and write the files of the best epoch.

    Raises:
        ConfigError: There are fewer rows than workers, or the workers do not divide the batch.
        TrainingFailed: The fit diverged, or the device has too little memory.
    """
    network_fit = prepare_fit(data, family, context, num_workers=context.scaling.num_workers)
    sample = data.rows.read(_first_group(data)).of(Part.fit).matrix[:SAMPLE_ROWS]
    run_fit(network_fit, sample=sample)


def run_fit(network_fit: NetworkFit, *, sample: Matrix) -> None:
    """Train on the workers, continuing from the run's last checkpoint, and write the files of the best epoch.

    Args:
        network_fit: The fit.
        sample: Encoded rows on which an exported graph is compared with its network.

    Raises:
        TrainingFailed: The fit diverged, or the device has too little memory.
    """
    family, context = network_fit.family, network_fit.context
    # The end of a fit waits for Ray Train's next health check. By default, health checks are two seconds apart.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(context.checkpoint.stall_after)
    scaling = context.scaling
    numbers = [scaling.min_workers, scaling.max_workers] if scaling.is_elastic else [scaling.max_workers]
    print(
        describe_steps(network_fit.steps, network_fit.num_rows, family.parameters, workers=numbers),
        flush=True,
    )
    with display_progress(unit="epoch", total=network_fit.steps.epochs, claim=context.claim) as reports:
        if scaling.is_elastic:
            fit_elastic(network_fit, reports)
        else:
            run_trainer(build_trainer(network_fit, num_workers=scaling.max_workers, reports=reports))
    files = context.files
    assert files is not None
    checkpoint = newest_complete(files)
    export_network(
        family.module,
        network_fit.signature,
        family.parameters,
        load(files.read(best_path(checkpoint.best_epoch))),
        folder=context.folder,
        sample=sample,
    )


def fit_elastic(network_fit: NetworkFit, reports: Queue) -> None:
    """Train on as many workers as there is room for, see `jobs.train.network.elastic`."""
    context = network_fit.context
    workers = WorkerRange.of(
        context.scaling,
        batch_rows=network_fit.steps.batch_rows,
        accumulation=context.deepspeed.gradient_accumulation,
        selector=context.selector,
    )

    def fit(number: int, start: int) -> Any:
        trainer = build_trainer(
            network_fit,
            num_workers=number,
            reports=reports,
            workers=workers,
            name=f"{context.run_name}-{start}",
        )
        return run_trainer(trainer)

    run_elastic(workers, fit, max_restarts=MAX_RESTARTS, room=lambda: free_resources(workers.selector))


def _first_group(data: TrainingData) -> int:
    return next(group for group, count in enumerate(data.rows.counts(Part.fit)) if count)


def run_trainer(trainer: TorchTrainer) -> Any:
    """Run the trainer and return Ray Train's result.

    Raises:
        TrainingFailed: The fit diverged, a worker had too little memory, or workers died too often.
        RefusedError: A worker refused its input.
    """
    try:
        return trainer.fit()
    except TrainingFailedError as error:
        raise (reason_of(error) or error) from None


def failure_config(*, is_elastic: bool) -> FailureConfig:
    """Return how often Ray Train starts workers again.

    An elastic run counts the room again. Ray Train would try to start the same number of workers without end.
    """
    if not is_elastic:
        return FailureConfig(max_failures=MAX_RESTARTS)
    limits: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 0}  # typed for Ray Train V1
    return FailureConfig(**limits)


def build_trainer(
    network_fit: NetworkFit,
    *,
    num_workers: int,
    callbacks: list[Any] | None = None,
    reports: Queue | None = None,
    workers: WorkerRange | None = None,
    name: str | None = None,
) -> TorchTrainer:
    """Return the Ray Train trainer of one fit.

    Args:
        network_fit: Data, family, steps and context of the fit.
        num_workers: Number of training processes.
        callbacks: Ray Train callbacks, for example to report a sweep's metrics to Tune.
        reports: Queue that gets the losses.
        workers: The numbers of workers that the run may have. If it is set, Ray Train does not restart dead workers.
        name: Name of Ray Train's run; by default, that of the context.
    """
    context, scaling = network_fit.context, network_fit.context.scaling
    return TorchTrainer(
        cast(Any, train_worker),  # by Ray's types it returns nothing, but Ray does pass its value on
        train_loop_config={
            "loop": ray.put(network_fit.loop_config()),
            "files": context.files,
            "checkpoint": context.checkpoint,
            "reports": reports,
            "workers": workers,
        },
        torch_config=TorchConfig(backend="nccl" if scaling.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=scaling.per_worker,
            # All on one node, because they exchange gradients over connections that are not encrypted.
            placement_strategy="STRICT_PACK",
            **options(context.selector),  # type: ignore[arg-type]
        ),
        run_config=RunConfig(
            name=name or context.run_name,
            storage_path=context.runs,
            storage_filesystem=context.file_system,
            failure_config=failure_config(is_elastic=workers is not None),
            callbacks=[cast(Any, EndOfHopelessRuns()), *(callbacks or ())],  # typed for Ray Train V1
        ),
    )
