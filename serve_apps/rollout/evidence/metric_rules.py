"""How the units' values of a rollout's metrics are computed. The event of the start has these rules, as JSON."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.statistics.policy import Better, Form
from serve_apps.rollout.json_form import as_json, from_json

QUALITIES = {"brier": Better.low, "accuracy": Better.high, "squared_error": Better.low}
"""Scores of a row's prediction against its outcome, and which values are better. `cluster.statistics.quality` computes
them, and needs NumPy."""
MEASURES = {"cpu_ms": Better.low, "took_ms": Better.low}
"""What a request costs, as its record says. No outcome is needed."""


class Per(enum.StrEnum):
    """The denominator of a ratio."""

    rows = "rows"
    requests = "requests"


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricRule:
    """How a unit's value of one metric is computed."""

    name: str
    score: str
    """One of `QUALITIES` or `MEASURES`."""
    form: Form = Form.mean
    per: Per = Per.rows
    """Only of a ratio."""
    covariate: str = ""
    """Only of an adjusted metric: the logged input, as it was at the unit's first request."""

    @property
    def is_quality(self) -> bool:
        return self.score in QUALITIES


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentRule:
    """Counts a metric a second time, for the units of a segment."""

    name: str
    """Name of the counts."""
    metric: str
    column: str
    """Logged input. Its value at the unit's first request decides."""
    value: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowRule:
    """When a copy is slow, and when it disagrees with the champion."""

    slow_ms: float
    """A copy that takes longer is slow; infinite if none is."""
    tolerance: float = 0.0
    """Two values of a regression that differ by more disagree. Two labels disagree if they differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """All rules of one rollout."""

    outcome_window_s: float
    """Time after a unit's first request in which its requests and their outcomes count, in seconds."""
    rules: tuple[MetricRule, ...]
    segments: tuple[SegmentRule, ...] = ()
    shadow: ShadowRule | None = None
    """None if the treatment answers clients."""
    squared_error_limit: float = 1.0
    """Greatest squared error that is counted."""


def scoring_as_json(scoring: Scoring) -> dict[str, Any]:
    """Return the rules as the event of the start has them.

    Means of a quality are in `qualities`, as an older release knows them. The other rules are in fields that it does
    not read, so it never reaches a goal that it cannot compute.
    """
    simple = [rule for rule in scoring.rules if rule.is_quality and rule.form is Form.mean]
    content: dict[str, Any] = {
        "outcome_window_s": scoring.outcome_window_s,
        "qualities": {rule.name: rule.score for rule in simple},
        "squared_error_limit": scoring.squared_error_limit,
    }
    others = {
        "rules": [as_json(rule) for rule in scoring.rules if rule not in simple],
        "segments": as_json(scoring.segments),
        "shadow": None if scoring.shadow is None else _shadow_as_json(scoring.shadow),
    }
    return content | {name: value for name, value in others.items() if value}


def scoring_from_json(content: Mapping[str, Any]) -> Scoring:
    """Return the rules of an event of the start.

    Raises:
        KeyError, ValueError, TypeError: They are not those of this class.
    """
    simple = [MetricRule(name=name, score=score) for name, score in content["qualities"].items()]
    shadow = content.get("shadow")
    return Scoring(
        outcome_window_s=float(content["outcome_window_s"]),
        rules=(*simple, *(from_json(MetricRule, rule) for rule in content.get("rules", ()))),
        segments=tuple(from_json(SegmentRule, one) for one in content.get("segments", ())),
        shadow=None if shadow is None else _shadow_from_json(shadow),
        squared_error_limit=float(content["squared_error_limit"]),
    )


def _shadow_as_json(rule: ShadowRule) -> dict[str, Any]:
    """Return the rule. JSON has no infinity, so null means that no copy is slow."""
    slow_ms = None if rule.slow_ms == float("inf") else rule.slow_ms
    return {"slow_ms": slow_ms, "tolerance": rule.tolerance}


def _shadow_from_json(content: Mapping[str, Any]) -> ShadowRule:
    slow_ms = content["slow_ms"]
    return ShadowRule(
        slow_ms=float("inf") if slow_ms is None else float(slow_ms), tolerance=float(content["tolerance"])
    )
