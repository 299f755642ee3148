"""What a verdict also depends on: signals, which only hold, and the limits of a shadow."""

from __future__ import annotations

from cluster.statistics.comparisons import improvement, is_worse
from cluster.statistics.evidence import EventCounts, Evidence, MetricCounts
from cluster.statistics.no_harm import is_above_limit
from cluster.statistics.planning import Plan
from cluster.statistics.policy import Margin


def signals_out_of_bounds(plan: Plan, evidence: Evidence) -> list[str]:
    """Return the declared signals in which the treatment is proven to be worse by more than the margin.

    All signals together have the error `ErrorRates.signals`, over all looks.
    """
    found = []
    for signal in plan.policy.signals:
        counts = evidence.metrics.get(signal.name, MetricCounts())
        if is_worse(
            plan.policy.metric(signal.metric),
            counts,
            tolerated=signal.margin,
            error=plan.signal_error,
            variance=plan.signal_tunings[signal.name],
        ):
            found.append(
                f"{signal.name} is worse by more than the margin, {difference(plan, signal.metric, counts)}"
            )
    return found


def shares_above_limits(plan: Plan, evidence: Evidence) -> list[str]:
    """Return the events of a shadow whose share of units is proven to be above the guardrail's limit."""
    found, units = [], evidence.watched_units
    for guardrail in plan.policy.event_guardrails:
        failing = evidence.events.get(guardrail.event, EventCounts()).watched
        if is_above_limit(failing, units, limit=guardrail.limit, error=plan.guardrail_error):
            found.append(
                f"{guardrail.event}: {failing} of {units} units of the shadow, limit {guardrail.limit:.3%}"
            )
    return found


def difference(plan: Plan, metric: str, counts: MetricCounts) -> str:
    """Return the improvement in a metric and its standard error in words."""
    effect = improvement(plan.policy.metric(metric), counts, tolerated=Margin())
    return (
        f"improvement {float(effect.estimate):.4g} ± {float(effect.standard_error):.2g} with "
        f"{int(effect.units)} units"
    )
