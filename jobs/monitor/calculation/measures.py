"""Types of the monitor's results: the value of a figure in one chunk, and a figure in all chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.runtime import Task

METRIC_NAMES = {Task.binary: "auc", Task.multiclass: "auc", Task.regression: "rmse"}
"""Falaj's name for the metric of each task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Value of one figure in one chunk, with its interval and thresholds."""

    value: float
    lower: float | None
    upper: float | None
    """`lower` to `upper` is the interval that sampling alone explains. Both are None for a distance."""
    lower_threshold: float | None
    upper_threshold: float | None
    alert: bool
    """True if the value is beyond a threshold."""


Measures = dict[str, Measure]
"""Measures by chunk. A chunk whose figure is undefined is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure in all chunks."""

    measures: Measures = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Chunks without a value or without a threshold, each with the reason."""


def undefined_figure(chunks: Iterable[str], reason: str) -> Figure:
    """Return a figure that is undefined in all chunks for the same reason."""
    return Figure(reasons=dict.fromkeys(chunks, f"undefined: {reason}"))


def without_threshold(value: float) -> Measure:
    """Return a measure with a value and no threshold. It gives no alert."""
    return Measure(
        value=value, lower=None, upper=None, lower_threshold=None, upper_threshold=None, alert=False
    )
