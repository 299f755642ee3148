"""Drawings of a card, with the charts of the pipelines' report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jobs.pipeline.report.charts import Curve, Dots, calibration_plot, dot_chart, legend
from jobs.pipeline.report.formats import score

LONGEST = 26
"""Longer labels are cut, because they would leave the drawing."""


def intervals(values: Mapping[str, tuple[float | None, Sequence[float] | None]], *, label: str) -> Markup:
    """Draw values with their intervals: one row for each name."""
    rows = [
        Dots(label=_cut(name), values=[value], band=None if ends is None else (ends[0], ends[1]))
        for name, (value, ends) in values.items()
    ]
    return dot_chart(rows, label=label, number=score)


def reliability(bins: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw the observed rate against the predicted probability."""
    points = [(one["mean_probability"], one["positive_rate"]) for one in bins]
    return calibration_plot([Curve(name="model", points=points)], label="Reliability plot")


def group_rates(groups: Mapping[str, Mapping[str, Any]], column: str) -> Markup:
    """Draw the selection rate and the true positive rate of each group."""
    rows = [
        Dots(label=_cut(name), values=[one["selection_rate"], one["true_positive_rate"]])
        for name, one in groups.items()
        if one["judged"]
    ]
    names = ["selection rate", "true positive rate"]
    return legend(names) + dot_chart(rows, label=f"Rates by {column}", number=score)


def bars(values: Mapping[str, float], *, label: str) -> Markup:
    """Draw one dot for each value."""
    rows = [Dots(label=_cut(name), values=[value]) for name, value in values.items()]
    return dot_chart(rows, label=label, number=lambda value: f"{value:.3g}")


def robustness(measured: Mapping[str, Any], *, shown: int) -> Markup:
    """Draw the metric with each input missing or shifted. The line is the metric of the unchanged rows."""
    rows = [
        Dots(
            label=_cut(name),
            values=[value, measured["shifted"].get(name)],
            mark=measured["unchanged"],
        )
        for name, value in list(measured["missing"].items())[:shown]
    ]
    return legend(["missing", "shifted"]) + dot_chart(
        rows, label=f"{measured['metric']} with changed inputs", number=score
    )


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
