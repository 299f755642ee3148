"""From a run's figures to the rows and charts of its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from jobs.pipeline.charts import Curve, Dots, Interval, calibration, dots, intervals, key
from jobs.pipeline.formats import points, score

Json = Mapping[str, Any]

Z_99 = 2.576
"""Standard normal quantile of a two-sided 99% interval."""
DRIFT_SHOWN = 10
SCORE, SCORE_IN_WORDS = "_score", "the model's own score"
"""What the monitor calls the predicted probability among the inputs."""
SLICE_NAMES = {
    "SEX": ("Sex", {"1": "male", "2": "female"}),
    "RAC1P": (
        "Race",
        {
            "1": "White",
            "2": "Black",
            "3": "American Indian",
            "4": "Alaska Native",
            "5": "Native, tribe unspecified",
            "6": "Asian",
            "7": "Pacific Islander",
            "8": "some other race",
            "9": "two or more",
        },
    ),
}
"""Census codes in words (American Community Survey data dictionary, 2015)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a variant should have got of the requests, and what it got."""

    variant: str
    weight: float
    share: float
    lower: float
    upper: float
    """Ends of the interval in which 99 of 100 right splits lie."""

    @property
    def within(self) -> bool:
        return self.lower <= self.share <= self.upper


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How far an input has moved, at its farthest."""

    variant: str
    name: str
    distance: float
    threshold: float
    period: str
    alerts: Sequence[str]


def share_rows(shares: Json, requests: int) -> list[Share]:
    """Shares with the interval of a binomial proportion, normal approximation."""
    return [
        Share(variant=name, weight=one["weight"], share=one["share"], lower=lower, upper=upper)
        for name, one in shares.items()
        for lower, upper in [split_interval(one["weight"], requests)]
    ]


def split_interval(weight: float, requests: int) -> tuple[float, float]:
    """Where a share of `weight` over so many requests lies 99 times of 100."""
    if requests < 1:
        return 0.0, 1.0
    half = Z_99 * math.sqrt(weight * (1 - weight) / requests)
    return max(0.0, weight - half), min(1.0, weight + half)


def share_chart(shares: Json, requests: int) -> Markup:
    """How far each variant's share lies from its weight, in percentage points."""
    rows = [
        Dots(
            label=row.variant,
            values=[row.share - row.weight],
            band=(row.lower - row.weight, row.upper - row.weight),
            mark=0.0,
        )
        for row in share_rows(shares, requests)
    ]
    return dots(rows, label="Share of requests per variant, as its difference from the weight", number=points)


def quarantine_rows(quarantine: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str, int]]:
    """View, reason and rows, the most frequent first."""
    return [
        (view, reason, rows)
        for view, reasons in quarantine.items()
        for reason, rows in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]


def calibration_chart(evaluations: Mapping[str, Json], candidates: Sequence[str]) -> Markup:
    """Reliability curves of the candidates."""
    curves = [
        Curve(
            name=name,
            points=[
                (one["mean_probability"], one["positive_rate"])
                for one in evaluations.get(name, {}).get("metrics", {}).get("calibration") or []
            ],
        )
        for name in candidates
    ]
    if not any(curve.points for curve in curves):
        return Markup("")
    return key(candidates) + calibration(
        curves, label="Calibration: predicted probability against observed rate"
    )


def slice_charts(evaluations: Mapping[str, Json], candidates: Sequence[str]) -> list[tuple[str, Markup]]:
    """Per sliced column, the AUC of every candidate in each group that is large enough to judge."""
    slices = {name: evaluations.get(name, {}).get("slices", {}) for name in candidates}
    columns = list(dict.fromkeys(column for by_column in slices.values() for column in by_column))
    charts = []
    for column in columns:
        title, words = SLICE_NAMES.get(column.rpartition("__")[2], (column, {}))
        groups = list(dict.fromkeys(group for one in slices.values() for group in one.get(column, {})))
        rows = [_slice_row(slices, candidates, column, group, words.get(group, group)) for group in groups]
        chart = dots([row for row in rows if any(value is not None for value in row.values)],
                     label=f"AUC by {title.lower()}", number=score)  # fmt: skip
        if chart:
            charts.append((title, key(candidates) + chart))
    return charts


def performance_chart(summary: Json, monitor: Json) -> Markup:
    """Estimated and realised performance of every variant, per period."""
    panels = {
        variant: [_interval(period, one, monitor, variant) for period, one in periods.items()]
        for variant, periods in summary.items()
        if periods
    }
    if not panels:
        return Markup("")
    return key(["estimated, before outcomes are known", "realised, from outcomes"]) + intervals(
        panels, label="Estimated and realised AUC per variant and year"
    )


def drift_rows(monitor: Json) -> list[Drift]:
    """The inputs that moved the farthest against their threshold, each at its farthest."""
    rows = [
        _drift(variant, name, periods)
        for variant, details in monitor.get("details", {}).items()
        for name, periods in (details.get("drift") or {}).items()
        if any(_measured(one) for one in periods.values())
    ]
    return sorted(rows, key=lambda row: -row.distance / row.threshold)[:DRIFT_SHOWN]


def _slice_row(slices: Json, candidates: Sequence[str], column: str, group: str, label: str) -> Dots:
    found = [slices[name].get(column, {}).get(group, {}) for name in candidates]
    num_rows = max((one.get("rows", 0) for one in found), default=0)
    return Dots(label=f"{label} ({num_rows:,})", values=[one.get("auc") for one in found])


def _interval(period: str, one: Json, monitor: Json, variant: str) -> Interval:
    measured = monitor.get("variants", {}).get(variant, {}).get(period, {}).get("estimate") or {}
    return Interval(
        period=period,
        estimated=one.get("estimated_auc"),
        lower=measured.get("lower"),
        upper=measured.get("upper"),
        realised=one.get("realised_auc"),
    )


def _measured(one: Json) -> bool:
    return one.get("value") is not None and bool(one.get("upper_threshold"))


def _drift(variant: str, name: str, periods: Json) -> Drift:
    measured = {period: one for period, one in periods.items() if _measured(one)}
    farthest = max(
        measured, key=lambda period: float(measured[period]["value"] / measured[period]["upper_threshold"])
    )
    return Drift(
        variant=variant,
        name=SCORE_IN_WORDS if name == SCORE else name,
        distance=measured[farthest]["value"],
        threshold=measured[farthest]["upper_threshold"],
        period=farthest,
        alerts=[period for period, one in measured.items() if one.get("alert")],
    )
