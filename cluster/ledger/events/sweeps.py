"""Events of sweeps: a sweep continues from them after it was killed. They have no values of rows."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.ledger.events.base import Json, LedgerEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepStarted(LedgerEvent):
    """A sweep started. A sweep that continues has no second event."""

    model: str
    run: str
    family: str
    settings: dict[str, Json]
    """Everything that determines the trials, by dotted name, such as `sweep.trials` and `data.hash`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialStarted(LedgerEvent):
    """A trial started. A trial that was interrupted has another event with the same parameters."""

    model: str
    run: str
    trial: int
    """Number of the trial in the sweep, from 1."""
    parameters: dict[str, Json]
    """The searched hyper-parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialReported(LedgerEvent):
    """A trial reported its validation loss after an epoch or a segment of trees."""

    model: str
    run: str
    trial: int
    rung: int
    """Number of the report, from 1."""
    loss: float | None
    """None if the loss is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialFinished(LedgerEvent):
    """A trial ended. It is not run again."""

    model: str
    run: str
    trial: int
    status: str
    """`finished`, `stopped` (by the scheduler or the time budget) or `failed`."""
    loss: float | None
    """Smallest validation loss; None if the trial failed."""
    reason: str = ""
    """Type of the error of a failed trial. A message may contain values of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepFinished(LedgerEvent):
    model: str
    family: str
    trials: int
    metric: str
    best: dict[str, Json]
    results: list[dict[str, Json]]
    training_set_hash: str
    run: str = ""
    """Older events have neither this field nor the next one."""
    best_trial: int | None = None
