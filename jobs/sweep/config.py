"""Configuration of `jobs.sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.train.config import LearningConfig


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """Search space and size of a sweep."""

    learning_rate: list[float] = field(default_factory=lambda: [0.001, 0.01])
    """Lowest and highest learning rate. Values are drawn log-uniformly between them."""
    width: list[int] = field(default_factory=lambda: [64, 128, 256])
    """Network widths to choose from."""
    trials: int = 3
    """Number of trials."""
    epochs: int = 1
    """Epochs of each trial."""
    num_workers: int = 0
    """Training workers of each trial. 0 trains in the trial's own process: starting a worker takes longer than a short
    trial."""
    concurrent_trials: int = 2
    """At most this many trials run at the same time. There are fewer if the cluster has too few CPUs."""
    rows: int = 20_000
    """A trial is fitted on at most this many rows."""
    trial_deadline_s: float = 300.0
    """Time budget of the sweep in seconds, passed to Tune as `time_budget_s`."""

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
    """Configuration of one sweep."""

    sweep: SearchConfig = field(default_factory=SearchConfig)
    output: str | None = None
    """File to write the best parameters to, as JSON. `jobs.train params_from=…` reads this file."""
