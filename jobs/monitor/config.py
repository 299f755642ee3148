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
    reference: str | None = None
    """Training set (Parquet). Its held-out rows are the reference; each version scores them again. None takes each
    version's own training set, or the reference rows that it was registered with."""
    label: str | None = None
    """Column of the reference with the true values. None takes each version's own label."""
    predictions: str | None = None
    """Output folder of `jobs.score`. Its scores are measured, not those of the prediction log."""
    outcome: str | None = None
    """Column of `predictions` with the true values. None takes them from the outcome log."""
    timestamp: str = "event_timestamp"
    """Column of the reference with the event time."""
    period: Period = Period.year
    """Calendar length of a chunk of served rows. The `as_of` of a row decides to which chunk the row belongs."""
    split: SplitConfig | None = field(default_factory=SplitConfig)
    """Rows of the reference that each version is compared with. `split.column=auto` takes the rows that the version's
    own training held out. A column name takes the rows where that column modulo `modulo` is `remainder`.
    `split.column=null` and `split=null` take all rows."""
    min_rows: int = 300
    """A chunk with fewer rows gets no figures. A chunk with fewer outcomes gets no realised performance."""
    output: str | None = None
    """File to write all figures to, as JSON."""

    def __post_init__(self) -> None:
        if self.outcome is not None and self.predictions is None:
            raise ValueError(
                "outcome is a column of predictions. Give predictions=…, the output of jobs.score."
            )
