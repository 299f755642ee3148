"""Convert the figures of a demo run to the rows and charts of its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from jobs.pipeline.report.charts import (
    Curve,
    Dots,
    Interval,
    calibration_plot,
    dot_chart,
    interval_chart,
    legend,
)
from jobs.pipeline.report.formats import percent, points, score

Json = Mapping[str, Any]

Z_99 = 2.576
"""Standard normal quantile of a two-sided 99% interval."""
DRIFT_SHOWN = 10
"""The drift table shows at most this many inputs."""
SCORE, SCORE_TEXT = "_score", "the model's own score"
"""Name of the predicted probability in the monitor's output, and in the report."""

ALERT_KINDS = {"drift": "drift", "missing": "nulls", "unseen": "unknown values"}
"""Text for each kind of alert of an input."""
TRAFFIC_KINDS = {
    "requests": "number of requests",
    "refused": "requests without an answer",
    "unseen": "entities without any feature",
}
"""Text for each kind of unusual traffic."""


class SliceNames(NamedTuple):
    """Names of a sliced column in the report."""

    title: str
    values: Mapping[str, str]
    """Name of each value."""


SLICE_NAMES = {
    "SEX": SliceNames("Sex", {"1": "male", "2": "female"}),
    "RAC1P": SliceNames(
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
"""Names of census columns and codes (American Community Survey data dictionary, 2015)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A variant's share of the requests, with its weight."""

    variant: str
    weight: float
    """Configured share, 0 to 1."""
    share: float
    """Counted share, 0 to 1."""
    lower: float
    upper: float
    """With a correct random split, the share is between `lower` and `upper` in 99% of the runs."""

    @property
    def within(self) -> bool:
        """Return whether the counted share is inside the interval."""
        return self.lower <= self.share <= self.upper


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Largest drift of one input in any period."""

    variant: str
    name: str
    distance: float
    threshold: float
    period: str
    """Period with the largest drift."""
    alerts: Sequence[str]
    """Periods in which the distance is beyond the threshold."""


class QuarantineRow(NamedTuple):
    """How many rows of one view were quarantined for one reason."""

    view: str
    reason: str
    rows: int


class SliceChart(NamedTuple):
    """Chart of the metrics by the values of one column."""

    title: str
    chart: Markup


def share_rows(shares: Json, requests: int) -> list[Share]:
    """Return the share of each variant with its 99% interval: binomial proportion, normal approximation."""
    return [
        Share(variant=name, weight=share["weight"], share=share["share"], lower=lower, upper=upper)
        for name, share in shares.items()
        for lower, upper in [split_interval(share["weight"], requests)]
    ]


def split_interval(weight: float, requests: int) -> tuple[float, float]:
    """Return the interval that contains a variant's share in 99% of runs, if the variant has this weight."""
    if requests < 1:
        return 0.0, 1.0
    half = Z_99 * math.sqrt(weight * (1 - weight) / requests)
    return max(0.0, weight - half), min(1.0, weight + half)


def share_chart(shares: Json, requests: int) -> Markup:
    """Draw the difference between each variant's share and its weight, in percentage points."""
    rows = [
        Dots(
            label=row.variant,
            values=[row.share - row.weight],
            band=(row.lower - row.weight, row.upper - row.weight),
            mark=0.0,
        )
        for row in share_rows(shares, requests)
    ]
    return dot_chart(
        rows, label="Share of requests per variant, as its difference from the weight", number=points
    )


def quarantine_rows(quarantine: Mapping[str, Mapping[str, int]]) -> list[QuarantineRow]:
    """Return the number of quarantined rows by view and reason, the most frequent reason first."""
    return [
        QuarantineRow(view, reason, rows)
        for view, reasons in quarantine.items()
        for reason, rows in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    ]


def calibration_chart(evaluations: Mapping[str, Json], candidates: Sequence[str]) -> Markup:
    """Draw the reliability curves of the candidates."""
    curves = [
        Curve(
            name=name,
            points=[
                (bin_["mean_probability"], bin_["positive_rate"])
                for bin_ in evaluations.get(name, {}).get("metrics", {}).get("calibration") or []
            ],
        )
        for name in candidates
    ]
    if not any(curve.points for curve in curves):
        return Markup("")
    return legend(candidates) + calibration_plot(
        curves, label="Calibration: predicted probability against observed rate"
    )


def slice_charts(evaluations: Mapping[str, Json], candidates: Sequence[str]) -> list[SliceChart]:
    """For each sliced column, draw the AUC of every candidate in each group with enough rows."""
    slices = {name: evaluations.get(name, {}).get("slices", {}) for name in candidates}
    columns = list(dict.fromkeys(column for by_column in slices.values() for column in by_column))
    charts = []
    for column in columns:
        names = SLICE_NAMES.get(column.rpartition("__")[2], SliceNames(column, {}))
        groups = dict.fromkeys(group for by_column in slices.values() for group in by_column.get(column, {}))
        rows = [
            _slice_row([slices[name].get(column, {}).get(group, {}) for name in candidates], label)
            for group in groups
            for label in [names.values.get(group, group)]
        ]
        judged = [row for row in rows if any(value is not None for value in row.values)]
        chart = dot_chart(judged, label=f"AUC by {names.title.lower()}", number=score)
        if chart:
            charts.append(SliceChart(names.title, legend(candidates) + chart))
    return charts


def performance_chart(summary: Json, monitor: Json) -> Markup:
    """Draw estimated and realised performance of every variant by period."""
    panels = {
        variant: [_interval(period, figures, monitor, variant) for period, figures in periods.items()]
        for variant, periods in summary.items()
        if periods
    }
    if not panels:
        return Markup("")
    return legend(["estimated, before outcomes are known", "realised, from outcomes"]) + interval_chart(
        panels, label="Estimated and realised AUC per variant and year"
    )


def drift_rows(monitor: Json) -> list[Drift]:
    """Return the inputs with the largest drift relative to the threshold, each in the period with its largest drift."""
    rows = [
        _drift(variant, name, periods)
        for variant, details in monitor.get("details", {}).items()
        for name, periods in (details.get("drift") or {}).items()
        if any(_is_measured(measure) for measure in periods.values())
    ]
    return sorted(rows, key=lambda row: -row.distance / row.threshold)[:DRIFT_SHOWN]


class RankedInput(NamedTuple):
    """An input with alerts."""

    variant: str
    name: str
    alerts: int
    reasons: str
    periods: Sequence[str]


def ranked_inputs(monitor: Json) -> list[RankedInput]:
    """Return the inputs with most alerts, over drift, nulls and unknown values."""
    rows = [
        RankedInput(
            variant=variant,
            name=SCORE_TEXT if row["column"] == SCORE else row["column"],
            alerts=row["alerts"],
            reasons=", ".join(ALERT_KINDS[kind] for kind in row["kinds"]),
            periods=row["chunks"],
        )
        for variant, details in monitor.get("details", {}).items()
        for row in details.get("ranking") or ()
    ]
    return sorted(rows, key=lambda row: -row.alerts)[:DRIFT_SHOWN]


class JointDrift(NamedTuple):
    """Drift of all inputs together in one period."""

    variant: str
    period: str
    error: float
    lower: float | None
    upper: float | None
    alert: bool


def joint_drift(monitor: Json) -> list[JointDrift]:
    """Return the reconstruction error of each variant and period."""
    return [
        JointDrift(
            variant=variant,
            period=period,
            error=measure["value"],
            lower=measure.get("lower_threshold"),
            upper=measure.get("upper_threshold"),
            alert=bool(measure.get("alert")),
        )
        for variant, details in monitor.get("details", {}).items()
        for period, measure in (details.get("reconstruction") or {}).items()
    ]


class UnusualHour(NamedTuple):
    """An hour with unusual traffic."""

    kind: str
    hour: str
    value: str
    usual: str


def unusual_hours(monitor: Json) -> list[UnusualHour]:
    """Return the newest hours with unusual traffic. All variants have the same: it is that of the model."""
    details: Json = next(iter(monitor.get("details", {}).values()), {})
    rows = []
    for kind, hours in (details.get("traffic") or {}).items():
        convert = _whole if kind == "requests" else percent
        for hour, measure in hours.items():
            if measure.get("alert"):
                low, high = measure.get("lower_threshold") or 0.0, measure.get("upper_threshold")
                usual = f"{convert(low)} to {convert(1.0 if high is None else high)}"
                rows.append(UnusualHour(TRAFFIC_KINDS[kind], hour, convert(measure["value"]), usual))
    return sorted(rows, key=lambda row: row.hour, reverse=True)[:DRIFT_SHOWN]


def _whole(value: float) -> str:
    return str(round(value))


def _slice_row(metrics: Sequence[Json], label: str) -> Dots:
    """Return the row of one group. `metrics` contains one item for each candidate: its metrics in this group."""
    num_rows = max((candidate.get("rows", 0) for candidate in metrics), default=0)
    return Dots(label=f"{label} ({num_rows:,})", values=[candidate.get("auc") for candidate in metrics])


def _interval(period: str, figures: Json, monitor: Json, variant: str) -> Interval:
    estimate = monitor.get("variants", {}).get(variant, {}).get(period, {}).get("estimate") or {}
    return Interval(
        period=period,
        estimated=figures.get("estimated_auc"),
        lower=estimate.get("lower"),
        upper=estimate.get("upper"),
        realised=figures.get("realised_auc"),
    )


def _is_measured(measure: Json) -> bool:
    return measure.get("value") is not None and bool(measure.get("upper_threshold"))


def _drift(variant: str, name: str, periods: Json) -> Drift:
    measured = {period: measure for period, measure in periods.items() if _is_measured(measure)}
    farthest = max(
        measured, key=lambda period: float(measured[period]["value"] / measured[period]["upper_threshold"])
    )
    return Drift(
        variant=variant,
        name=SCORE_TEXT if name == SCORE else name,
        distance=measured[farthest]["value"],
        threshold=measured[farthest]["upper_threshold"],
        period=farthest,
        alerts=[period for period, measure in measured.items() if measure.get("alert")],
    )
