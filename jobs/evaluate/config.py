"""Configuration of `jobs.evaluate`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cluster.settings import PlatformConfig


class Rows(enum.Enum):
    """Which rows of the data are evaluated."""

    held_out = "held_out"
    """Those the version's own training held out."""
    all = "all"
    """Every row: for data that had no part in the training."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(PlatformConfig):
    """One evaluation of one model version."""

    name: str
    """Of the model."""
    training_set: str
    """Parquet file with the model's inputs and its label."""
    version: str = "latest"
    """A number, an alias, or `latest`."""
    rows: Rows = Rows.held_out
    slices: list[str] = field(default_factory=list)
    """Columns to report by value, `person__SEX`."""
    min_slice_rows: int = 50
    """A smaller slice is listed, but not judged."""
    output: str | None = None
    """File the result is written to as JSON."""

    def __post_init__(self) -> None:
        if self.min_slice_rows < 1:
            raise ValueError(f"min_slice_rows must be at least 1, got {self.min_slice_rows}.")
