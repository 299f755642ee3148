"""The training loop of one process. It is the same for every family, every ZeRO stage, and every number of workers.

ZeRO's collective operations wait for all ranks. So every rank makes the same number of forward passes, and saves at the
same steps.
"""

from __future__ import annotations

import importlib
import math
import random
import time
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from cluster.errors import TrainingFailed
from jobs.train.network.engine import learning_rate, set_learning_rate, start_engine
from jobs.train.network.plan import LoopConfig
from jobs.train.progress import METRIC, divergence_message
from jobs.train.rows.batches import Batch

TRAINING_LOSS = "training_loss"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """The place of one process among the workers."""

    rank: int = 0
    workers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopState:
    """How far a run is. It is equal on all ranks, except for `loss_sum`."""

    epoch: int = 0
    step: int = 0
    """Steps of the epoch that are done."""
    best_loss: float = math.inf
    """Smallest validation loss of a finished epoch."""
    best_epoch: int = -1
    loss_sum: float = 0.0
    """Sum of this rank's losses since the epoch began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Metrics of the run at one step, or at the end of an epoch."""

    epoch: int
    step: int
    """Steps of the epoch that are done."""
    values: dict[str, float]
    """Losses by name, and `learning_rate`."""
    rows_per_s: float = 0.0


class Observer(Protocol):
    """What happens with a run's state and metrics. All ranks call the same methods in the same order."""

    def restore(self, engine: Any) -> LoopState | None:
        """Load the state to continue from. None starts from the beginning."""
        ...

    def after_step(self, engine: Any, state: LoopState) -> None:
        """Save the state if that is due."""
        ...

    def after_epoch(self, engine: Any, state: LoopState, metrics: StepMetrics, *, is_best: bool) -> None:
        """Report the metrics of an epoch, and keep the best weights."""
        ...

    def log(self, metrics: StepMetrics) -> None:
        """Record metrics of a step."""
        ...


def run_loop(config: LoopConfig, rank: Rank, observer: Observer) -> None:
    """Fit a network as one of the workers.

    Raises:
        TrainingFailed: A loss is NaN or infinite. All ranks have the same losses, so all ranks raise this error.
    """
    engine = start_engine(config, workers=rank.workers)
    seed_process(config.seed, rank.rank)
    state = observer.restore(engine) or LoopState()
    _Loop(config, rank, observer, engine).run(state)


def seed_process(seed: int, rank: int) -> None:
    """Seed the random generators of this process. Each rank draws other dropout masks."""
    draw = np.random.default_rng([seed, rank])
    random.seed(int(draw.integers(2**31)))
    np.random.seed(int(draw.integers(2**31)))
    torch.manual_seed(int(draw.integers(2**31)))


@dataclass
class _Loop:
    config: LoopConfig
    rank: Rank
    observer: Observer
    engine: Any
    family: Any = field(init=False)
    reader: Any = field(init=False)

    def __post_init__(self) -> None:
        self.family = importlib.import_module(self.config.module)
        self.reader = self.config.batches.reader(seed=self.config.seed)

    def run(self, state: LoopState) -> None:
        """Run all epochs from a state on."""
        for epoch in range(state.epoch, self.config.steps.epochs):
            state = self._train_epoch(replace(state, epoch=epoch))
            state = self._end_epoch(state)

    def _train_epoch(self, state: LoopState) -> LoopState:
        self.engine.train()
        steps, settings = self.config.steps, self.config.deepspeed
        loss_sum, logged = state.loss_sum, _Window(state.loss_sum, state.step)
        batches = self.reader.batches(
            state.epoch, first_step=state.step, steps=steps.steps, batch_rows=steps.batch_rows
        )
        for step, batch in enumerate(batches, start=state.step):
            progress = (state.epoch * steps.steps + step) / steps.total
            rate = learning_rate(
                self.config.parameters.learning_rate, progress, warmup_share=settings.warmup_share
            )
            set_learning_rate(self.engine, rate)
            loss_sum += self._step(batch)
            done = replace(state, step=step + 1, loss_sum=loss_sum)
            if done.step % self.config.log_every == 0 or done.step == steps.steps:
                loss, rows_per_s = logged.next(self, loss_sum, done.step)
                values = {TRAINING_LOSS: loss, "learning_rate": rate}
                self.observer.log(
                    StepMetrics(epoch=done.epoch, step=done.step, values=values, rows_per_s=rows_per_s)
                )
            if done.step < steps.steps:  # the end of an epoch has its own checkpoint
                self.observer.after_step(self.engine, done)
        return replace(state, step=steps.steps, loss_sum=loss_sum)

    def _step(self, batch: Batch) -> float:
        """Train on this rank's part of a global batch, and return the mean loss of this part."""
        passes = self.config.deepspeed.gradient_accumulation
        parts = passes * self.rank.workers
        total = torch.zeros((), device=self.engine.device, dtype=torch.float64)
        for number in range(passes):
            rows = slice(number * self.rank.workers + self.rank.rank, None, parts)
            loss = self._loss(Batch(batch.matrix[rows], batch.target[rows]))
            total += loss.detach()
            self.engine.backward(loss)
            self.engine.step()
        return float(total) / passes

    def _end_epoch(self, state: LoopState) -> LoopState:
        mean = self.sum_of_ranks(state.loss_sum) / (self.config.steps.steps * self.rank.workers)
        losses = {TRAINING_LOSS: mean, METRIC: self._validation_loss()}
        _require_finite(losses, when=f"epoch {state.epoch + 1} of {self.config.steps.epochs}")
        is_best = losses[METRIC] < state.best_loss
        after = LoopState(
            epoch=state.epoch + 1,
            best_loss=losses[METRIC] if is_best else state.best_loss,
            best_epoch=state.epoch if is_best else state.best_epoch,
        )
        metrics = StepMetrics(epoch=state.epoch, step=self.config.steps.steps, values=losses)
        self.observer.after_epoch(self.engine, after, metrics, is_best=is_best)
        return after

    def _validation_loss(self) -> float:
        """Return the mean loss of the validation rows. Each rank evaluates its own part."""
        self.engine.eval()
        total, rows, passes = 0.0, 0, 0
        last: Batch | None = None
        with torch.no_grad():
            for last in self.reader.validation(rank=self.rank.rank, workers=self.rank.workers):
                total += float(self._loss(last)) * len(last.target)
                rows, passes = rows + len(last.target), passes + 1
            for _ in range(passes, self.reader.validation_steps(workers=self.rank.workers)):
                # ZeRO 3 gathers weights in each forward pass, so all ranks make equally many.
                self._loss(last if last is not None else self.reader.any_batch())
        return self.sum_of_ranks(total) / self.sum_of_ranks(rows)

    def _loss(self, batch: Batch) -> torch.Tensor:
        device, signature = self.engine.device, self.config.signature
        outputs = self.engine(torch.from_numpy(np.ascontiguousarray(batch.matrix)).to(device))
        target = signature.encode_target(batch.target).to(device)
        loss: torch.Tensor = self.family.loss(outputs, target, signature)
        return loss

    def sum_of_ranks(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        total = torch.tensor(float(value), dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(total)
        return float(total)


class _Window:
    """The steps since the last entry of the metrics."""

    def __init__(self, loss_sum: float, step: int) -> None:
        self._loss_sum, self._step, self._at = loss_sum, step, time.monotonic()

    def next(self, loop: _Loop, loss_sum: float, step: int) -> tuple[float, float]:
        """Return the mean loss of all ranks and the rows per second since the last call."""
        steps, now = step - self._step, time.monotonic()
        mean = loop.sum_of_ranks(loss_sum - self._loss_sum) / (steps * loop.rank.workers)
        rate = steps * loop.config.steps.batch_rows / max(now - self._at, 1e-9)
        self._loss_sum, self._step, self._at = loss_sum, step, now
        return mean, rate


def _require_finite(losses: dict[str, float], *, when: str) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            raise TrainingFailed(divergence_message(name.replace("_", " "), value, when))


def random_states() -> dict[str, Any]:
    """Return the states of this process's random generators."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set the random generators of this process."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
