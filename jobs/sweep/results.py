"""Results of a sweep's trials, and the choice of the best trial. A trial without a finite loss is never chosen."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from cluster.errors import RefusedError, TrainingFailed, refusal_behind
from jobs.train.network.loop import METRIC


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Result of one trial. The field names are also the keys in the sweep's output."""

    learning_rate: float
    width: int
    validation_loss: float | None
    """Finite loss, or None if the trial failed."""
    cause: str | None = None
    """Reason why the trial failed, or None."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Hyper-parameters of the trial."""
        return {"learning_rate": self.learning_rate, "width": self.width}

    def describe(self) -> str:
        """Describe parameters and result in one line."""
        result = f"{METRIC} {self.validation_loss:.4f}" if self.cause is None else self.cause
        return f"learning_rate={self.learning_rate:.3g} width={self.width}: {result}"


def trial_from_result(result: Any, *, deadline_s: float) -> Trial:
    """Convert Tune's `Result` to a `Trial`.

    Args:
        result: Tune's result of one trial.
        deadline_s: Configured time limit of the sweep in seconds, for the error message.
    """
    config, metrics = result.config or {}, result.metrics or {}
    loss: float | None = metrics.get(METRIC)
    cause: str | None = None
    if result.error is not None:
        cause = error_line(result.error)
    elif loss is None:
        cause = f"ended before its first epoch (sweep.trial_deadline_s is {deadline_s:g})"
    elif not math.isfinite(loss):
        cause = f"{METRIC} is {loss}"
    return Trial(
        learning_rate=config.get("learning_rate", math.nan),
        width=config.get("width", 0),
        validation_loss=loss if cause is None else None,
        cause=cause,
    )


def error_line(error: BaseException) -> str:
    """Return a trial's error in one line: the message of a refusal, or the last line of a traceback."""
    original = refusal_behind(error)
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    if not lines:
        return type(original).__name__
    return lines[0] if isinstance(original, RefusedError | TrainingFailed) else lines[-1]


def best_trial(trials: list[Trial]) -> Trial:
    """Return the trial with the smallest loss.

    Raises:
        TrainingFailed: No trial has a finite loss. The cause of each trial is printed to standard error.
    """
    best = min(trials, key=_finite_loss, default=None)
    if best is None or best.validation_loss is None:
        for number, trial in enumerate(trials, start=1):
            print(f"trial {number}: {trial.describe()}", file=sys.stderr, flush=True)
        raise TrainingFailed(
            f"None of {len(trials)} trials has a finite {METRIC}, so the sweep has no best trial. "
            "Standard error has the cause of each."
        )
    return best


def _finite_loss(trial: Trial) -> float:
    return math.inf if trial.validation_loss is None else trial.validation_loss
