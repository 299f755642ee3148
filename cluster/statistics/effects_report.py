"""The effects of a rollout for its summary: each goal and guardrail with its estimate and its bounds.

The bounds are those of the tests, so they hold at all looks. An unknown bound is None: too few units, or no variance.
"""

from __future__ import annotations

import math
from typing import Any

from cluster.statistics.comparisons import improvement
from cluster.statistics.evidence import EventCounts, Evidence, MetricCounts
from cluster.statistics.no_harm import bound_of_failing_share
from cluster.statistics.planning import Plan
from cluster.statistics.policy import EventGuardrail, Margin
from cluster.statistics.sequences import radius


def effects(plan: Plan, evidence: Evidence) -> list[dict[str, Any]]:
    """Return the effect of each goal, guardrail on a metric and guardrail on an event, as JSON values."""
    policy = plan.policy
    found = [
        _of_metric(plan, evidence, f"goal: {goal.kind}", goal.metric, policy.errors.goals)
        | {"margin": goal.margin.size}
        for goal in policy.goals
    ]
    found += [
        _of_metric(plan, evidence, "guardrail", one.metric, plan.guardrail_error)
        | {"margin": one.margin.size}
        for one in policy.metric_guardrails
    ]
    return found + [_of_event(plan, evidence, one) for one in policy.event_guardrails]


def _of_metric(plan: Plan, evidence: Evidence, kind: str, name: str, error: float) -> dict[str, Any]:
    """Return the improvement of the treatment in a metric."""
    counts = evidence.metrics.get(name, MetricCounts())
    effect = improvement(plan.policy.metric(name), counts, tolerated=Margin())
    variance = plan.goal_tunings[name] if kind.startswith("goal") else plan.guardrail_tuning
    estimate = float(effect.estimate)
    width = float(radius(effect, error=error, variance=variance))
    return {
        "kind": kind,
        "name": name,
        "treatment": _finite(float(counts.treatment.mean)),
        "control": _finite(float(counts.control.mean)),
        "estimate": _finite(estimate),
        "low": _finite(estimate - width),
        "high": _finite(estimate + width),
        "units": int(effect.units),
    }


def _of_event(plan: Plan, evidence: Evidence, guardrail: EventGuardrail) -> dict[str, Any]:
    """Return the share of the treatment's watched units that had an event, with its upper bound."""
    counts, units = evidence.events.get(guardrail.event, EventCounts()), evidence.watched_units
    bound = bound_of_failing_share(counts.watched, units, error=plan.policy.errors.no_harm)
    return {
        "kind": "guardrail",
        "name": guardrail.event.value,
        "treatment": counts.treatment,
        "control": counts.control,
        "estimate": counts.watched / units if units else None,
        "low": 0.0,
        "high": float(bound),
        "units": units,
        "margin": guardrail.limit,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
