"""Configuration of `jobs.sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.train.config import LearningConfig


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """What is tried."""

    learning_rate: list[float] = field(default_factory=lambda: [0.001, 0.01])
    """Lowest and highest; drawn log-uniformly."""
    width: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Choices."""
    trials: int = 3
    epochs: int = 1
    """Of each trial."""
    num_workers: int = 0
    """Of each trial; 0 trains in the trial's own process, because starting a worker takes longer than a short trial."""
    concurrent_trials: int = 2
    """At once, as far as they fit into the cluster."""
    rows: int = 20_000
    """Training rows of each trial, at most."""
    trial_deadline_s: float = 300.0
    """No further trial is started after so long."""

    def __post_init__(self) -> None:
        if len(self.learning_rate) != 2 or not 0 < self.learning_rate[0] <= self.learning_rate[1] < 1:
            raise ValueError(
                f"sweep.learning_rate must be two rising numbers between 0 and 1, got {self.learning_rate}."
            )
        if not self.width or min(self.width) < 1:
            raise ValueError(f"sweep.width must be positive choices, got {self.width}.")
        for name in ("trials", "epochs", "concurrent_trials", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"sweep.{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_workers < 0:
            raise ValueError(f"sweep.num_workers must be at least 0, got {self.num_workers}.")


@dataclass(kw_only=True, slots=True)
class SweepConfig(LearningConfig):
    """One sweep."""

    sweep: SearchConfig = field(default_factory=SearchConfig)
    output: str | None = None
    """JSON file with the best parameters, for `jobs.train params_from=…`."""
