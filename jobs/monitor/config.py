"""The monitoring job's configuration."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cluster.settings import PlatformConfig


class Period(enum.Enum):
    """Calendar length of a chunk, in UTC."""

    year = "year"
    month = "month"
    day = "day"


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

    name: str
    """Of the model."""
    reference: str
    """Training set (Parquet); its held-out rows, scored anew, are the reference."""
    label: str
    """Column of the reference with the true values."""
    timestamp: str = "event_timestamp"
    """Column of the reference that says when a row was true."""
    period: Period = Period.year
    """Length of a chunk of served rows, by their `as_of`."""
    split: SplitConfig | None = None
    min_rows: int = 300
    """Nothing is said about a chunk with fewer rows, nor about realised performance with fewer outcomes."""
    output: str | None = None
    """JSON file."""
