"""Sections of a policy's file: steps, goals, guardrails, expected traffic, and error rates."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.statistics.policy import GoalKind, UnitEvent


@dataclass(kw_only=True, slots=True)
class StepSpec:
    """One weight of a canary."""

    weight: float = 0.0
    """Percent of the units, in steps of 0.01, at most 50."""
    bake_s: float | None = None
    """Least time of the step, in seconds. Null means the policy's `bake_s`."""


@dataclass(kw_only=True, slots=True)
class GoalSpec:
    """What must be proven before the version is promoted."""

    metric: str = ""
    kind: GoalKind = GoalKind.superiority
    margin: float = 0.0
    is_relative: bool = False
    """The margin is a share of control's value."""
    expected: float = 0.0
    """Improvement that the plan assumes."""


@dataclass(kw_only=True, slots=True)
class EventGuardrailSpec:
    """Rolls back if too many units have an event."""

    event: UnitEvent = UnitEvent.failure
    ratio: float = 1.0
    """Rate, relative to that of control, that is tolerated."""
    limit: float = 0.05
    """Each step must prove that the share of units with the event is below this limit."""


@dataclass(kw_only=True, slots=True)
class MetricGuardrailSpec:
    """Rolls back if a metric is proven to be worse than control's by more than the margin."""

    metric: str = ""
    margin: float = 0.0
    is_relative: bool = False


@dataclass(kw_only=True, slots=True)
class BaselineSpec:
    """What is known about a metric before the rollout."""

    mean: float = 0.0
    deviation: float = 0.0


@dataclass(kw_only=True, slots=True)
class TrafficSpec:
    """What the plan assumes about the requests. Wrong assumptions cost time or power, but change no error rate."""

    units_per_hour: float = 0.0
    """Number of units that come for the first time in an hour of a step."""
    events: dict[str, float] = field(default_factory=dict)
    """Share of the champion's units that have an event in a step, by event."""
    metrics: dict[str, BaselineSpec] = field(default_factory=dict)
    outcome_delay_s: float = 0.0
    """Time from a unit's first request to the end of its outcome window, in seconds."""


@dataclass(kw_only=True, slots=True)
class ErrorSpec:
    """Probabilities of false results over the whole rollout."""

    goals: float = 0.05
    no_harm: float = 0.05
    guardrails: float = 0.05
    mismatch: float = 0.001
    signals: float = 0.05
