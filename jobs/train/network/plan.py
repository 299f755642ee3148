"""Steps and batches of a fit, as plain data for the workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cluster.errors import ConfigError
from jobs.train.config import DeepSpeedConfig

MAX_BATCH, MIN_BATCH = 1024, 16
"""Bounds of the automatic batch size, in rows."""
MIN_STEPS = 16
"""The automatic batch size gives an epoch at least this many steps, if `MIN_BATCH` allows that."""
FEW_STEPS = 4
"""If a configured batch size gives an epoch fewer steps than this, a warning is printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """How an epoch is divided into steps. It is the same for every number of workers.

    If the last rows are too few for a step, they are skipped. Each epoch shuffles the rows and so skips other rows.
    """

    epochs: int
    steps: int
    """Steps of an epoch."""
    batch_rows: int
    """Rows of a step, of all workers together."""

    @property
    def total(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """Everything that a worker needs to fit a network."""

    module: str
    """Module of the family."""
    parameters: Any
    """Hyper-parameters of the family."""
    signature: Any
    """What `build` and `loss` get: a `NetworkSignature`, or what the batches need instead."""
    batches: Any
    """Batches of the rows, see `jobs.train.rows.batches`: an object with `reader(seed)`."""
    steps: Steps
    deepspeed: DeepSpeedConfig
    seed: int
    device: str = "cpu"
    """`cpu` or `cuda`."""
    log_every: int = 10
    """Steps between two entries of the run's metrics."""


def plan_steps(rows: int, parameters: Any, *, workers: list[int], accumulation: int) -> Steps:
    """Return the steps of a fit.

    If `batch_size` is None, it is a power of two between `MIN_BATCH` and `MAX_BATCH`. Small data sets get small
    batches, so that an epoch has at least `MIN_STEPS` steps if possible. With one step per epoch, a network learns
    almost nothing.

    Args:
        rows: Number of rows to fit on.
        parameters: Hyper-parameters with `epochs` and `batch_size`.
        workers: Numbers of workers that the fit may have.
        accumulation: Backward passes of each worker in a step.

    Raises:
        ConfigError: There are fewer rows than workers, or the workers do not divide the batch.
    """
    parts = math.lcm(*workers) * accumulation
    if rows < parts:
        raise ConfigError(
            f"{max(workers)} workers are too many for {rows} rows to fit on. Set scaling.num_workers=1."
        )
    batch = parameters.batch_size
    if batch is None:
        largest = rows // MIN_STEPS
        batch = min(MAX_BATCH, max(MIN_BATCH, 1 << max(0, largest.bit_length() - 1)))
        batch = max(parts, batch - batch % parts)
    elif batch % parts:
        raise ConfigError(
            f"model.batch_size={batch} cannot be divided among {_described(workers)} with "
            f"deepspeed.gradient_accumulation={accumulation}. Set model.batch_size={max(parts, batch - batch % parts)}."
        )
    batch = min(batch, rows - rows % parts)
    return Steps(epochs=parameters.epochs, steps=max(1, rows // batch), batch_rows=batch)


def describe_steps(steps: Steps, rows: int, parameters: Any, *, workers: list[int]) -> str:
    """Describe the number of epochs, steps and rows of a fit, with a warning if there are too few steps."""
    description = (
        f"fitting a network on {_described(workers)}: {steps.epochs} epochs of {steps.steps} steps of "
        f"{steps.batch_rows} rows ({rows} rows to fit on)"
    )
    if steps.steps >= FEW_STEPS or parameters.batch_size is None:
        return description
    return (
        f"{description}\nwarning: model.batch_size={parameters.batch_size} gives only {steps.steps} steps per epoch; "
        "lower it or raise model.epochs"
    )


def _described(workers: list[int]) -> str:
    return f"{workers[0]} workers" if len(workers) == 1 else f"{workers[0]} to {workers[-1]} workers"
