"""Configuration of `jobs.monitor`."""

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
    """Configuration of one monitoring run."""

    name: str
    """Model name."""
    reference: str
    """Training set (Parquet). Its held-out rows, scored again by each version, are the reference."""
    label: str
    """Column of the reference with the true values."""
    timestamp: str = "event_timestamp"
    """Column of the reference with the event time."""
    period: Period = Period.year
    """Calendar length of a chunk of served rows. A row belongs to a chunk by its `as_of`."""
    split: SplitConfig | None = field(default_factory=SplitConfig)
    """Rows of the reference that each version is compared with. `split.column=auto` takes the rows that the version's
    own training held out. A column name takes the rows where that column modulo `modulo` is `remainder`.
    `split.column=null` and `split=null` take all rows."""
    min_rows: int = 300
    """Smallest number of rows of a chunk with figures, and smallest number of outcomes for realised performance."""
    output: str | None = None
    """File to write all figures to, as JSON."""
