"""Configuration of `jobs.evaluate`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cluster.settings import PlatformConfig


class Rows(enum.Enum):
    """Rows to evaluate."""

    held_out = "held_out"
    """Rows that the version's training held out."""
    all = "all"
    """All rows. Choose this for data that was not used in training."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(PlatformConfig):
    """Configuration of one evaluation of one model version."""

    name: str
    """Model name."""
    training_set: str
    """Parquet file with the inputs and the label of the model."""
    version: str = "latest"
    """Version number, alias, or `latest`."""
    rows: Rows = Rows.held_out
    """Rows to evaluate: `held_out` or `all`."""
    slices: list[str] = field(default_factory=list)
    """Columns to slice by, for example `person__SEX`: the result has metrics for each value of these columns."""
    min_slice_rows: int = 50
    """A slice with fewer rows gets no metrics; only its number of rows is reported."""
    output: str | None = None
    """File to write the result to, as JSON."""

    def __post_init__(self) -> None:
        if self.min_slice_rows < 1:
            raise ValueError(f"min_slice_rows must be at least 1, got {self.min_slice_rows}.")
