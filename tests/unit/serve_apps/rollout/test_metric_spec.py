"""What a policy's file may say about metrics, signals and shadows. A wrong field is named."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from cluster.errors import RolloutError
from cluster.runtime import InputSpec, ModelSignature, Task
from cluster.statistics.policy import Form, GoalKind, UnitEvent
from serve_apps.rollout.evidence.metric_rules import Per, scoring_from_json
from serve_apps.rollout.evidence.metric_tables import SUMS
from serve_apps.rollout.policy.metric_spec import MAX_NAME, MetricSpec, SignalSpec
from serve_apps.rollout.policy.sections import BaselineSpec, EventGuardrailSpec, GoalSpec, TrafficSpec
from serve_apps.rollout.policy.spec import Mode, RolloutSpec
from serve_apps.rollout.start_checks import require_computable

NAMES = ("accuracy", "brier", "cpu_ms")
TRAFFIC = TrafficSpec(
    units_per_hour=20_000,
    events={"failure": 0.01, "disagreement": 0.1},
    metrics={name: BaselineSpec(mean=0.8, deviation=0.3) for name in NAMES},
    outcome_delay_s=400,
)


def spec(**fields: Any) -> RolloutSpec:
    return RolloutSpec(**{"event_guardrails": [EventGuardrailSpec()], "traffic": TRAFFIC} | fields)


def shadow(**fields: Any) -> RolloutSpec:
    return spec(**{"mode": Mode.shadow} | fields)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MetricSpec(name="acuracy"), "no quality 'acuracy'. Did you mean 'accuracy'?"),
        (MetricSpec(name="cost", measure="cpu"), "no measure 'cpu'. Did you mean 'cpu_ms'?"),
        (MetricSpec(name="cost", quality="cpu_ms"), "no quality 'cpu_ms'"),
        (MetricSpec(name="a", quality="brier", measure="cpu_ms"), "both a quality and a measure"),
        (MetricSpec(name="brier", per=Per.rows), "per of 'brier' has a meaning only with `form: ratio`"),
        (
            MetricSpec(name="brier", covariate="x"),
            "covariate of 'brier' has a meaning only with `form: adjusted`",
        ),
        (MetricSpec(name="brier", form=Form.adjusted), "'brier' is adjusted, so it needs a covariate"),
        (MetricSpec(name="brier", squared_error_limit=0), "squared_error_limit of 'brier' must be"),
        (MetricSpec(name="brier", form=Form.paired), "'brier' is paired, so an outcome must not depend"),
        (MetricSpec(name="cpu_ms", form=Form.paired), "'cpu_ms' is paired, but only one version answers"),
    ],
)
def test_wrong_metric_is_refused(metric: MetricSpec, message: str) -> None:
    """The message says which metric, and what to do."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the text is compared)
        spec(metrics=[metric])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 10.0}, "rollout.share has a meaning only with `mode: shadow`"),
        ({"tolerance": 1.0}, "rollout.tolerance has a meaning only with `mode: shadow`"),
        ({"signals": [SignalSpec(metric="brier")]}, "No metric 'brier'"),
        (
            {"metrics": [MetricSpec(name="brier")], "signals": [SignalSpec(metric="brier", column="x")]},
            "'brier' needs both a column and its values",
        ),
        (
            {
                "metrics": [MetricSpec(name="brier")],
                "signals": [SignalSpec(metric="brier", column="x", values=["v" * 200])],
            },
            "is longer than 128 characters",
        ),
        (
            {"event_guardrails": [EventGuardrailSpec(event=UnitEvent.disagreement)]},
            "only a shadow can have the event 'disagreement'",
        ),
        (
            {"metrics": [MetricSpec(name="m" * 129, quality="brier")]},
            f"'{'m' * 129}' is longer than 128 characters",
        ),
        ({"mode": Mode.shadow, "holdback": True}, "rollout.holdback has no meaning with `mode: shadow`"),
        ({"mode": Mode.shadow, "unit_watch_s": 1.0}, "rollout.unit_watch_s has no meaning"),
        ({"mode": Mode.shadow, "share": 0.001}, "rollout.steps.weight"),
        ({"mode": Mode.shadow, "share": 101.0}, "at most 100"),
        ({"mode": Mode.shadow, "weight": 20.0}, "rollout.weight has a meaning only with `mode: ab`"),
        ({"mode": Mode.shadow, "tolerance": -1.0}, "rollout.tolerance must be"),
        (
            {"mode": Mode.shadow, "traffic": TrafficSpec(units_per_hour=1, events={"failure": 0.01})},
            "outcome_delay_s must be above 0 with metrics and with `mode: shadow`",
        ),
        (
            {"mode": Mode.shadow, "event_guardrails": [EventGuardrailSpec(event=UnitEvent.slow)]},
            "rollout.slow_ms must be given",
        ),
        (
            {"mode": Mode.shadow, "metrics": [MetricSpec(name="brier", form=Form.ratio)]},
            "'brier' must be paired",
        ),
        ({"mode": Mode.shadow, "metrics": [MetricSpec(name="brier")]}, "must not depend on the prediction"),
    ],
)
def test_wrong_policy_is_refused(fields: dict[str, Any], message: str) -> None:
    """Fields that have no meaning with the mode are refused, too."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the text is compared)
        spec(**fields)
    assert message in str(refused.value)


def test_longest_name_fits_into_the_table() -> None:
    """PostgreSQL refuses a longer one, so the metric would never have any unit."""
    assert isinstance(SUMS.c.metric.type, sa.String)
    assert SUMS.c.metric.type.length == MAX_NAME


def test_plan_and_scoring_of_each_form() -> None:
    """An older release finds only the means of qualities in the event, so it reaches no goal that it cannot compute."""
    metrics = [
        MetricSpec(name="accuracy"),
        MetricSpec(name="brier", form=Form.adjusted, covariate="x"),
        MetricSpec(name="cpu_ms", form=Form.ratio),
    ]
    signals = [SignalSpec(metric="accuracy", margin=0.1, column="x", values=["1", "2"], share=0.1)]
    policy = spec(metrics=metrics, signals=signals)
    content = policy.scoring()
    assert content["qualities"] == {"accuracy": "accuracy"}
    scoring = scoring_from_json(content)
    assert [(rule.name, rule.form) for rule in scoring.rules] == [
        ("accuracy", Form.mean),
        ("brier", Form.adjusted),
        ("cpu_ms", Form.ratio),
    ]
    assert scoring.rules[2].per is Per.requests
    assert [segment.name for segment in scoring.segments] == ["accuracy[x=1]", "accuracy[x=2]"]
    assert set(policy.plan().smallest_signals) == {"accuracy[x=1]", "accuracy[x=2]"}


def test_shadow_compares_pairs() -> None:
    """A mean is the mean of the differences. The plan has one step, and refuses a goal that is too far."""
    policy = shadow(
        share=20.0,
        slow_ms=100.0,
        outcomes_independent=True,
        metrics=[MetricSpec(name="brier"), MetricSpec(name="cpu_ms")],
        goals=[GoalSpec(metric="brier", kind=GoalKind.non_inferiority, margin=0.05)],
        event_guardrails=[EventGuardrailSpec(event=UnitEvent.disagreement, limit=0.2)],
    )
    [step] = policy.plan().steps
    assert (step.weight, policy.plan().policy.is_shadow) == (20.0, True)
    assert {metric.form for metric in policy.policy().metrics} == {Form.paired}
    rule = scoring_from_json(policy.scoring()).shadow
    assert rule is not None
    assert rule.slow_ms == 100.0
    with pytest.raises(RolloutError, match=r"needs .* h, but its deadline is after"):
        shadow(
            outcomes_independent=True,
            metrics=[MetricSpec(name="brier")],
            goals=[GoalSpec(metric="brier", kind=GoalKind.non_inferiority, margin=0.0002)],
        ).plan()


def signature(*names: str, categories: tuple[str, ...] | None = None) -> ModelSignature:
    inputs = tuple(InputSpec(name=name, dtype="int64", categories=categories) for name in names)
    return ModelSignature(task=Task.binary, inputs=inputs, label="y", classes=(False, True))


@pytest.mark.parametrize(
    ("metric", "signals", "treatment", "message"),
    [
        (MetricSpec(name="brier", form=Form.paired), [], signature("x", "z"), "only the treatment reads 'z'"),
        (
            MetricSpec(name="brier", form=Form.adjusted, covariate="x"),
            [],
            signature("z"),
            "the covariate 'x' is no input of both versions",
        ),
        (
            MetricSpec(name="brier", form=Form.adjusted, covariate="x"),
            [],
            signature("x", categories=("a", "b")),
            "the covariate 'x' must be a number",
        ),
        (
            MetricSpec(name="brier"),
            [SignalSpec(metric="brier", column="z", values=["1"])],
            signature("x"),
            "the column 'z' is no input",
        ),
    ],
)
def test_versions_that_cannot_be_compared_are_refused(
    metric: MetricSpec, signals: list[SignalSpec], treatment: ModelSignature, message: str
) -> None:
    """Before the rollout starts."""
    policy = spec(metrics=[metric], signals=signals, outcomes_independent=True)
    with pytest.raises(RolloutError, match=message):
        require_computable(policy, treatment, signature("x"))
