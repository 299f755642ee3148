"""What is monitored: the answers of one version under one variant, from the log or from a run of batch scoring."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from cluster.records.progress import LogAge
from cluster.registry import ModelVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedVersion:
    """Answers of one version under one variant. A variant can have several versions, for example after a promotion."""

    variant: str
    version: ModelVersion
    failed: int
    """Number of rows without a finite score."""
    rows: pl.DataFrame = field(default_factory=pl.DataFrame)
    """One row for each scored entity of a run of batch scoring. Rows of the log are read chunk by chunk instead."""

    @property
    def name(self) -> str:
        """Variant and version as one text for printed output, for example `champion v2`."""
        return f"{self.variant} v{self.version.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredLog:
    """The rows of a run of batch scoring, with outcomes where they are known."""

    served: ServedVersion
    unknown_rows: int
    """Number of outcomes whose prediction is known but does not have the row."""
    ages: tuple[LogAge, ...] = ()
    """How complete the outcome log is."""
