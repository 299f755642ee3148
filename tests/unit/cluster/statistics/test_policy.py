"""A policy with wrong values is refused by a sentence that names the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.statistics.policy import (
    ErrorRates,
    EventGuardrail,
    Form,
    Goal,
    GoalKind,
    Margin,
    Metric,
    MetricGuardrail,
    Policy,
    Signal,
    Step,
    UnitEvent,
)
from tests.samples.rollout_simulations import POLICY

FAILURE = EventGuardrail(event=UnitEvent.failure, limit=0.1)
DISAGREEMENT = EventGuardrail(event=UnitEvent.disagreement, limit=0.1)
RELATIVE = Margin(size=0.1, is_relative=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: replace(POLICY, steps=(Step(weight=60),)), "step.weight must be above 0 and at most 50"),
        (lambda: Step(weight=101), "step.weight"),
        (lambda: Step(weight=0), "step.weight"),
        (lambda: Step(weight=1, bake_s=-1), "step.bake_s"),
        (lambda: EventGuardrail(event=UnitEvent.slow, ratio=0.9, limit=0.1), "ratio"),
        (lambda: EventGuardrail(event=UnitEvent.slow, limit=1), "limit"),
        (lambda: Margin(size=-0.1), "margin.size"),
        (lambda: Margin(size=1, is_relative=True), "relative margin"),
        (lambda: Goal(metric="quality", kind=GoalKind.non_inferiority), "needs a margin"),
        (lambda: ErrorRates(goals=0.6), "errors.goals"),
        (lambda: replace(POLICY, steps=()), "increasing"),
        (lambda: replace(POLICY, steps=(Step(weight=5), Step(weight=5))), "increasing"),
        (lambda: replace(POLICY, event_guardrails=()), "event_guardrails"),
        (lambda: replace(POLICY, event_guardrails=(FAILURE, FAILURE)), "different names"),
        (lambda: replace(POLICY, goals=POLICY.goals * 2), "goals must have different names"),
        (lambda: replace(POLICY, metrics=POLICY.metrics[:1]), "No metric 'cpu'. Known: quality"),
        (lambda: replace(POLICY, deadline_s=0), "deadline_s"),
        (lambda: replace(POLICY, watch_s=-1), "watch_s"),
        (
            lambda: replace(
                POLICY,
                goals=(),
                metrics=(Metric(name="brier", form=Form.paired),),
                metric_guardrails=(MetricGuardrail(metric="brier", margin=RELATIVE),),
            ),
            "cannot be relative",
        ),
        (lambda: Signal(metric="quality", share=0), "signal 'quality': share must be above 0"),
        (lambda: replace(POLICY, signals=(Signal(metric="qualty"),)), "No metric 'qualty'"),
        (lambda: replace(POLICY, signals=(Signal(metric="cpu"),) * 2), "signals must have different names"),
        (lambda: replace(POLICY, event_guardrails=(DISAGREEMENT,)), "only a shadow"),
        (lambda: replace(POLICY, is_shadow=True), "A shadow has one step, got 5"),
        (
            lambda: replace(POLICY, is_shadow=True, steps=(Step(weight=100),)),
            "Metric 'quality' must be paired",
        ),
        (
            lambda: Policy(
                steps=(Step(weight=100),),
                event_guardrails=(replace(FAILURE, ratio=2),),
                deadline_s=1,
                is_shadow=True,
            ),
            "ratio has no meaning for a shadow",
        ),
    ],
)
def test_wrong_value_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
