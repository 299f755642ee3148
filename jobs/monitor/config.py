"""The monitoring job's configuration."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cluster.settings import PlatformConfig
from jobs.train.config import SplitConfig


class Period(enum.Enum):
    """Calendar length of a chunk, in UTC."""

    year = "year"
    month = "month"
    day = "day"


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
    split: SplitConfig | None = field(default_factory=SplitConfig)
    """Which rows of the reference each version is held against. `auto` takes those that the version's own training held
    out; a column takes the rows where it modulo `modulo` is `remainder`; none takes all rows, and so does no split."""
    min_rows: int = 300
    """Nothing is said about a chunk with fewer rows, nor about realised performance with fewer outcomes."""
    output: str | None = None
    """JSON file."""
