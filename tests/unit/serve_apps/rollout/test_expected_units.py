"""A policy that its own expected traffic would fill is refused before the start."""

from __future__ import annotations

import pytest

from cluster.errors import RolloutError
from cluster.statistics.planning import Baseline, Traffic, plan
from cluster.statistics.policy import DAY_S, EventGuardrail, Metric, MetricGuardrail, Policy, Step, UnitEvent
from serve_apps.rollout.policy.expected_units import require_room

TRAFFIC = Traffic(
    units_per_hour=10_000,
    events={UnitEvent.failure: 0.01},
    metrics={"accuracy": Baseline(mean=0.8, deviation=0.4)},
)


def require(max_units: int, *, has_metrics: bool) -> None:
    """Require room for two days: 24,000 units of the treatment on the first one, and 120,000 on the second one."""
    policy = Policy(
        steps=(Step(weight=10, bake_s=DAY_S), Step(weight=50, bake_s=DAY_S)),
        metrics=(Metric(name="accuracy"),),
        event_guardrails=(EventGuardrail(event=UnitEvent.failure, limit=0.05),),
        metric_guardrails=(MetricGuardrail(metric="accuracy"),),
        deadline_s=7 * DAY_S,
        max_units=max_units,
    )
    require_room(plan(policy, TRAFFIC), TRAFFIC, has_metrics=has_metrics)


def test_units_of_each_step_must_have_room() -> None:
    """Those that come in its whole time, and not only those that it needs."""
    require(120_001, has_metrics=False)
    with pytest.raises(
        RolloutError, match=r"50 % gets about 120000 units in 24.0 h, so rollout.max_units must be"
    ):
        require(120_000, has_metrics=False)


def test_units_of_both_arms_and_all_steps_must_have_room_in_the_metrics() -> None:
    """They are stored until the rollout ends."""
    require(288_001, has_metrics=True)
    with pytest.raises(RolloutError, match=r"About 288000 units enter .* rollout.max_units must be greater"):
        require(288_000, has_metrics=True)
