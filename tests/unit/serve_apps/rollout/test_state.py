"""Rollout state as a fold over events, and the edge's map entry for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import polars as pl
import pytest

from cluster.ledger.events import (
    AliasMoved,
    LedgerEvent,
    RolloutPromoted,
    RolloutWeightChanged,
    ShadowStarted,
    ShadowStopped,
)
from cluster.runtime import InputSpec, ModelSignature, Task
from serve_apps.edge.haproxy.routes import entry, routes
from serve_apps.rollout.comparison.guardrail import Verdict, judge
from serve_apps.rollout.serving_state import ModelState, States, apply
from tests.samples.rollouts import DEPLOYED, ROLLED_BACK, STARTED


def fold(events: Iterable[LedgerEvent]) -> States:
    """Return the states after all events."""
    states: States = {}
    for event in events:
        states = apply(states, event)
    return states


def entry_after(*events: LedgerEvent) -> str | None:
    return entry(fold([*DEPLOYED, *events])["m"])


def test_without_a_rollout_all_units_get_the_champion() -> None:
    """No bucket is below 0 or at or above 10,000."""
    assert entry_after() == "m-v1|m-v1|champion|none|-|0|10000"


def test_rollout_is_two_bounds_in_one_entry() -> None:
    """20 % treatment from below, 20 % control from above."""
    assert entry_after(STARTED) == "m-v1|m-v2|challenger|r|s|2000|8000"


def test_rollback_gives_the_entry_without_a_rollout() -> None:
    """This is also true after a weight change."""
    change = RolloutWeightChanged(model="m", rollout="r", weight=50)
    assert entry_after(STARTED, change) == "m-v1|m-v2|challenger|r|s|5000|5000"
    assert entry_after(STARTED, change, ROLLED_BACK) == entry_after()


def test_promotion_makes_the_treatment_champion() -> None:
    """First the alias, then the end of the rollout: no unit goes back in between."""
    moved = AliasMoved(name="m", alias="champion", version=2, previous=1, reason="promoted")
    promoted = RolloutPromoted(model="m", rollout="r", version=2)
    between, after = entry_after(STARTED, moved), entry_after(STARTED, moved, promoted)
    assert between is not None
    assert between.startswith("m-v2|m-v2|")
    assert after == "m-v2|m-v2|champion|none|-|0|10000"


def test_shadow_is_in_the_state_and_in_no_entry() -> None:
    """The edge sends it no requests; a second shadow replaces the first, and survives the end of a rollout."""
    first, second = (ShadowStarted(model="m", version=n, app=f"m-v{n}", share=5.0) for n in (2, 3))
    assert entry_after(first) == entry_after()
    shadow = fold([*DEPLOYED, first, STARTED, second, ROLLED_BACK])["m"].shadow
    assert shadow is not None
    assert (shadow.version, shadow.app, shadow.share) == (3, "m-v3", 5.0)
    stopped = ShadowStopped(model="m", version=3, reason="")
    assert fold([*DEPLOYED, first, second, stopped]) == fold(DEPLOYED)


def test_weight_of_an_ended_rollout_is_ignored() -> None:
    stale = RolloutWeightChanged(model="m", rollout="older", weight=50)
    assert entry_after(STARTED, stale) == entry_after(STARTED)


def test_model_without_a_deployed_champion_has_no_route() -> None:
    """Requests for this model get 404."""
    assert entry(ModelState(champion_version=1)) is None
    assert routes({"m": ModelState(champion_version=1)}, {"m-v1": ("127.0.0.1:1",)}).entries == {}


def matched(treatment: list[tuple[int, float]], control: list[tuple[int, float]]) -> pl.DataFrame:
    arms = {"treatment": treatment, "control": control}
    rows = [
        {"arm": arm, "outcome": outcome, "probability": probability}
        for arm, pairs in arms.items()
        for outcome, probability in pairs
    ]
    return pl.DataFrame(rows)


def signature(task: Task, classes: tuple[str | int, ...] | None) -> ModelSignature:
    return ModelSignature(
        task=task, inputs=(InputSpec(name="x", dtype="float64"),), label="y", classes=classes
    )


ARMS = ("treatment", "control")
BINARY = signature(Task.binary, (0, 1))
GOOD = [(1, 0.9), (0, 0.1)] * 100
BAD = [(1, 0.1), (0, 0.9)] * 100


@pytest.mark.parametrize(
    ("treatment", "control", "verdict"),
    [(GOOD, GOOD, Verdict.holds), (BAD, GOOD, Verdict.breached), (BAD[:10], GOOD, Verdict.too_few)],
)
def test_guardrail_compares_treatment_and_concurrent_control(
    treatment: list[tuple[int, float]], control: list[tuple[int, float]], verdict: Verdict
) -> None:
    """Too few outcomes give no verdict, never a success."""
    finding = judge(matched(treatment, control), signature=BINARY, min_outcomes=100, max_drop=0.05)
    assert finding.verdict is verdict


def test_regression_and_multiclass_have_their_metric() -> None:
    """R² and accuracy; higher is better for both."""
    values = pl.DataFrame(
        {"arm": ["treatment", "control"] * 3, "outcome": [1.0, 1, 2, 2, 3, 3], "value": [3.0, 1, 3, 2, 3, 3]}
    )
    finding = judge(values, signature=signature(Task.regression, None), min_outcomes=1, max_drop=0.1)
    assert (finding.metric, finding.control, finding.verdict) == ("r2", 1.0, Verdict.breached)
    labels = pl.DataFrame({"arm": ["treatment", "control"], "outcome": ["a", "a"], "label": ["a", "a"]})
    assert (
        judge(labels, signature=signature(Task.multiclass, ("a", "b")), min_outcomes=1, max_drop=0.1).verdict
        is Verdict.holds
    )


@pytest.mark.parametrize("hostile", ["yes", 300, 2.5, "nan", True])
def test_wrong_outcome_cannot_stop_the_guardrail(hostile: str | float) -> None:
    """One such outcome, or one for each prediction, is ignored; the bad treatment is still finding."""
    frame = matched(BAD, GOOD)
    outcomes = [*frame["outcome"].to_list(), hostile]
    texts = any(isinstance(value, str) for value in outcomes)
    series = pl.Series("outcome", [str(value) if texts else float(value) for value in outcomes])
    one_more = pl.concat([frame, frame[:1]]).with_columns(series)
    finding = judge(one_more, signature=BINARY, min_outcomes=100, max_drop=0.05)
    assert finding.verdict is Verdict.breached
    assert finding.treatment_outcomes == 200 + (hostile is True)


@pytest.mark.parametrize("arm", ["treatment", "control"])
def test_outcome_without_a_finite_square_cannot_stop_the_guardrail(arm: str) -> None:
    """The treatment's R² would be NaN, which is never below the control's. So it would never be rolled back."""
    rows = [(arm, truth, 9.0 if arm == "treatment" else truth) for arm in ARMS for truth in (1.0, 2.0, 3.0)]
    values = pl.DataFrame([*rows, (arm, 1e308, 1.0)], schema=["arm", "outcome", "value"], orient="row")
    finding = judge(values, signature=signature(Task.regression, None), min_outcomes=3, max_drop=0.1)
    assert (finding.verdict, finding.control) == (Verdict.breached, 1.0)


def test_answers_without_a_finite_square_breach_the_guardrail() -> None:
    """The treatment gets the lowest finite metric, which can be stored."""
    rows = [(arm, truth, 1e300 if arm == "treatment" else truth) for arm in ARMS for truth in (1.0, 2.0, 3.0)]
    values = pl.DataFrame(rows, schema=["arm", "outcome", "value"], orient="row")
    finding = judge(values, signature=signature(Task.regression, None), min_outcomes=3, max_drop=0.1)
    assert (finding.verdict, finding.treatment) == (Verdict.breached, -sys.float_info.max)


def test_outcomes_of_one_class_give_no_verdict() -> None:
    """There are enough of them, but the metric is undefined: neither too few, nor a success."""
    finding = judge(matched([(1, 0.9)] * 200, GOOD), signature=BINARY, min_outcomes=100, max_drop=0.05)
    assert (finding.verdict, finding.treatment, finding.treatment_outcomes) == (Verdict.undefined, None, 200)


def test_the_positive_class_is_the_models_second() -> None:
    """It is not the greater of the outcomes' values."""
    frame = matched(GOOD, GOOD).with_columns(
        outcome=pl.col("outcome").replace_strict({1: "a_good", 0: "z_bad"}, return_dtype=pl.String)
    )
    finding = judge(
        frame, signature=signature(Task.binary, ("z_bad", "a_good")), min_outcomes=100, max_drop=0.05
    )
    assert (finding.treatment, finding.verdict) == (1.0, Verdict.holds)
