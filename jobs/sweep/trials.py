"""What came of a sweep's trials, and which of them wins: never one without a finite loss."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from cluster.errors import RefusedError, TrainingFailed, refusal_behind
from jobs.train.tabular_network.loop import METRIC


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What came of one trial. The field of the loss has the metric's name, as the sweep's output does."""

    learning_rate: float
    width: int
    validation_loss: float | None
    cause: str | None = None
    """Why it has no loss to be compared by."""

    @property
    def chosen(self) -> dict[str, Any]:
        """Its hyper-parameters."""
        return {"learning_rate": self.learning_rate, "width": self.width}

    def describe(self) -> str:
        """One line."""
        said = f"{METRIC} {self.validation_loss:.4f}" if self.cause is None else self.cause
        return f"learning_rate={self.learning_rate:.3g} width={self.width}: {said}"


def outcome(result: Any, *, deadline_s: float) -> Trial:
    """What came of a trial, from Tune's `Result`."""
    config, metrics = result.config or {}, result.metrics or {}
    loss: float | None = metrics.get(METRIC)
    cause: str | None = None
    if result.error is not None:
        cause = cause_of(result.error)
    elif loss is None:
        cause = f"ended before its first epoch did (sweep.trial_deadline_s is {deadline_s:g})"
    elif not math.isfinite(loss):
        cause = f"{METRIC} is {loss}"
    return Trial(
        learning_rate=config.get("learning_rate", math.nan),
        width=config.get("width", 0),
        validation_loss=loss if cause is None else None,
        cause=cause,
    )


def cause_of(error: BaseException) -> str:
    """A trial's error in one line: of a refusal its message, of a traceback the last line."""
    behind = refusal_behind(error)
    lines = [line.strip() for line in str(behind).splitlines() if line.strip()]
    if not lines:
        return type(behind).__name__
    return lines[0] if isinstance(behind, RefusedError) else lines[-1]


def winner(trials: list[Trial]) -> Trial:
    """The trial with the smallest loss.

    Raises:
        TrainingFailed: no trial has one; a line on standard error says why for each.
    """
    ended = [one for one in trials if one.cause is None]
    if not ended:
        for number, one in enumerate(trials, start=1):
            print(f"trial {number}: {one.describe()}", file=sys.stderr, flush=True)
        raise TrainingFailed(
            f"None of {len(trials)} trials has a finite {METRIC}, so the sweep has no winner."
        )
    return min(ended, key=lambda one: one.validation_loss or 0.0)
