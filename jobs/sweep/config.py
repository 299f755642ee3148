"""Configuration of `jobs.sweep`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from jobs.train.config import RUN_ID, LearningConfig

BEST_SUFFIX = "-best"
"""Suffix of the training run of the best trial."""
MAX_RUN = 64 - len(BEST_SUFFIX)


class Search(enum.Enum):
    """How the hyper-parameters of the next trial are chosen."""

    random = "random"
    optuna = "optuna"


class Scheduler(enum.Enum):
    """Which trials are stopped early."""

    none = "none"
    asha = "asha"


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """Search space and size of a sweep."""

    space: dict[str, Any] = field(default_factory=dict)
    """Maps hyper-parameter to `{from: a, to: b, log: true}` or `{choices: [a, b]}`."""
    model: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the trials that differ from those of the model, for example fewer epochs."""
    search: Search = Search.random
    """`random`, or `optuna`: its TPE sampler learns from the trials that have ended."""
    scheduler: Scheduler = Scheduler.none
    """`none`, or `asha`: stops a trial whose loss is worse than those of earlier trials after as many reports."""
    grace: int = 1
    """ASHA stops no trial before this many reports: epochs of a network, or segments of trees."""
    reduction: int = 3
    """ASHA lets about one of this many trials go on at each rung."""
    trials: int = 3
    """Number of trials."""
    num_workers: int = 0
    """Training workers of each trial of a network. 0 trains in the trial's own process: starting a worker takes longer
    than a short trial."""
    concurrent_trials: int = 2
    """At most this many trials run at the same time. There are fewer if serving leaves too few CPUs."""
    rows: int = 20_000
    """A trial is fitted on at most this many rows."""
    trial_deadline_s: float = 300.0
    """Time budget of the sweep in seconds, passed to Tune as `time_budget_s`."""

    def __post_init__(self) -> None:
        for name in ("grace", "trials", "concurrent_trials", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"sweep.{name} must be at least 1, got {getattr(self, name)}.")
        if self.reduction < 2:
            raise ValueError(f"sweep.reduction must be at least 2, got {self.reduction}.")
        if self.num_workers < 0:
            raise ValueError(f"sweep.num_workers must be at least 0, got {self.num_workers}.")
        if not self.trial_deadline_s > 0:
            raise ValueError(f"sweep.trial_deadline_s must be positive, got {self.trial_deadline_s}.")


@dataclass(kw_only=True, slots=True)
class SweepConfig(LearningConfig):
    """Configuration of one sweep."""

    sweep: SearchConfig = field(default_factory=SearchConfig)
    run: str | None = None
    """Id of the sweep. The same id continues a sweep that did not finish. None makes a new id."""
    register: bool = False
    """Whether the best trial is trained in full and registered."""
    report: str | None = None
    """HTML file for the plots."""
    output: str | None = None
    """File to write the best parameters to, as JSON. `jobs.train params_from=…` reads this file."""

    def __post_init__(self) -> None:
        # `slots=True` replaces the class, so zero-argument super() would refer to the original class and fail.
        LearningConfig.__post_init__(self)
        if self.run is not None and not (RUN_ID.fullmatch(self.run) and len(self.run) <= MAX_RUN):
            raise ValueError(
                f"run must be letters, digits, '.', '_' and '-', at most {MAX_RUN}, got '{self.run}'."
            )
