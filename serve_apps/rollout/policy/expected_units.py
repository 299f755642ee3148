"""How many units a plan's traffic brings, compared with how many are stored.

A rollout with `max_units` stored units holds for ever. So a policy that the expected traffic alone fills is refused.
"""

from __future__ import annotations

import math

from cluster.errors import RolloutError
from cluster.statistics.planning import Plan, Traffic


def require_room(plan: Plan, traffic: Traffic, *, has_metrics: bool) -> None:
    """Require that `max_units` is above the units of each step, and above all units that enter the metrics.

    Args:
        plan: The plan.
        traffic: What is assumed about the requests.
        has_metrics: Whether units enter metrics. Units of both arms do, except for a shadow.

    Raises:
        RolloutError: There is no room. The message names the number of units.
    """
    max_units = plan.policy.max_units
    for step in plan.steps:
        units = max(step.units, _units(traffic, step.weight, step.duration_s))
        if units >= max_units:
            raise RolloutError(
                f"The step of {step.weight:g} % gets about {units} units in {step.duration_s / 3600:.1f} h, so "
                f"rollout.max_units must be greater, got {max_units}."
            )
    entering = _entering(plan, traffic) if has_metrics else 0
    if entering >= max_units:
        raise RolloutError(
            f"About {entering} units enter the metrics in all steps, so rollout.max_units must be greater, got "
            f"{max_units}."
        )


def _entering(plan: Plan, traffic: Traffic) -> int:
    """Return how many units enter the metrics until the plan's end. Their outcome windows are over then."""
    until_s = plan.duration_s - traffic.outcome_delay_s
    began_s, units = 0.0, 0
    for step in plan.steps:
        units += _units(traffic, step.weight, min(step.duration_s, max(0.0, until_s - began_s)))
        began_s += step.duration_s
    return units if plan.policy.is_shadow else 2 * units


def _units(traffic: Traffic, weight: float, seconds: float) -> int:
    """Return how many units a version with this weight gets in a time."""
    return math.floor(traffic.units_per_hour * weight / 100 * seconds / 3600)
