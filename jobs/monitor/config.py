"""The monitoring job's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.settings import PlatformConfig


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """Which reference rows the model was not fitted on: `column % modulo == remainder`."""

    column: str | None = "person_id"
    """None takes all reference rows."""
    modulo: int = 4
    remainder: int = 3


@dataclass(kw_only=True, slots=True)
class MonitorConfig(PlatformConfig):
    """What is compared with what."""

    model: str = "???"
    reference: str = "???"
    """Training set (Parquet); its held-out rows, scored anew, are the reference."""
    label: str = "???"
    timestamp: str = "event_timestamp"
    """Column of the reference that says when a row was true."""
    period: str = "M"
    """Length of a chunk, as a pandas offset; thresholds come from the reference's own chunks."""
    split: SplitConfig | None = None
    min_rows: int = 300
    """Fewer rows of a variant are reported as too few and not estimated."""
    output: str | None = None
    """JSON file."""
