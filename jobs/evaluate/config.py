"""Configuration of `jobs.evaluate`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cluster.settings import PlatformConfig
from jobs.evaluate.attributions import AttributionConfig
from jobs.evaluate.requirements import RequireConfig
from jobs.evaluate.robustness import RobustnessConfig
from jobs.evaluate.threshold import CostConfig


class Rows(enum.Enum):
    """Rows to evaluate."""

    held_out = "held_out"
    """Rows that the version's training held out."""
    all = "all"
    """All rows. Choose this for data that was not used in training."""


@dataclass(kw_only=True, slots=True)
class BootstrapConfig:
    """Confidence intervals by the bootstrap."""

    replicates: int = 1000
    """Number of draws; 0 turns intervals off."""
    level: float = 0.95
    """Share of the intervals that are to contain the true value."""
    entities: list[str] | None = None
    """Columns whose values together name an entity. Rows of one entity are drawn together. None takes the join key of
    the split, or the training set's join keys."""

    def __post_init__(self) -> None:
        if self.replicates and self.replicates < 100:
            raise ValueError(f"bootstrap.replicates must be 0 or at least 100, got {self.replicates}.")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"bootstrap.level must be at least 0.5 and below 1, got {self.level}.")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(PlatformConfig):
    """Configuration of one evaluation of one model version."""

    name: str
    """Model name."""
    training_set: str | None = None
    """Parquet file with the inputs and the label of the model. None takes the version's own training set."""
    version: str = "latest"
    """Version number, alias, or `latest`."""
    rows: Rows = Rows.held_out
    """Rows to evaluate: `held_out` or `all`."""
    slices: list[str] = field(default_factory=list)
    """Columns to slice by, for example `person__SEX`: the result has metrics for each value of these columns."""
    min_slice_rows: int = 50
    """A slice or group with fewer rows gets no metrics; only its number of rows is reported."""
    fairness: list[str] = field(default_factory=list)
    """Columns whose values are groups that should be treated alike. Only for a binary task."""
    bootstrap: BootstrapConfig = field(default_factory=BootstrapConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    attributions: AttributionConfig = field(default_factory=AttributionConfig)
    require: RequireConfig = field(default_factory=RequireConfig)
    seed: int = 0
    """Seed of all draws."""
    output: str | None = None
    """File to write the result to, as JSON."""

    def __post_init__(self) -> None:
        if self.min_slice_rows < 1:
            raise ValueError(f"min_slice_rows must be at least 1, got {self.min_slice_rows}.")
        for name in ("demographic_parity_difference", "equal_opportunity_difference"):
            if getattr(self.require, name) is not None and not self.fairness:
                raise ValueError(
                    f"require.{name} needs `fairness=[…]`: the columns whose groups are compared."
                )
        if self.require.cost is not None and not self.cost.is_stated:
            raise ValueError("require.cost needs cost.false_positive and cost.false_negative.")
