"""Each form of a metric, segments and a shadow's counts, from real logs. The oracles are NumPy and SciPy."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cluster.errors import RolloutError
from cluster.records.schema import COPY_FAILED, COPY_REFUSED, PredictionRecord
from cluster.runtime import InputSpec, Model
from cluster.runtime.encoding import Matrix
from cluster.statistics.effects import (
    Effect,
    adjusted_difference,
    difference_of_ratios,
    paired_difference,
)
from cluster.statistics.evidence import MetricCounts
from cluster.statistics.planning import Traffic, plan
from cluster.statistics.policy import DAY_S, EventGuardrail, Form, Policy, Step, UnitEvent
from cluster.statistics.verdict import Verdict, judge
from serve_apps.rollout.evidence.metric_rules import (
    MetricRule,
    Per,
    Scoring,
    SegmentRule,
    ShadowRule,
    scoring_as_json,
    scoring_from_json,
)
from serve_apps.rollout.evidence.metric_tables import read_metrics, read_shadow_counts
from serve_apps.rollout.evidence.outcomes import OutcomeReader
from serve_apps.rollout.evidence.store import Counting, EvidenceStore
from tests.samples.record_log import FLAGS, outcome
from tests.unit.serve_apps.rollout.evidence.test_outcomes import METRICS, START, Logs, asked, at

PAIRED = MetricRule(name="brier", score="brier", form=Form.paired)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    opened = Logs(tmp_path, {1: FLAGS, 2: FLAGS})
    yield opened
    opened.ledger.close()


def collect(logs: Logs, *rules: MetricRule, models: Any = None, **scoring: Any) -> dict[str, MetricCounts]:
    """Add all cohorts of the first 1,000 seconds, and return what has entered each metric."""
    given = Scoring(outcome_window_s=400, rules=rules, **scoring)
    assert scoring_from_json(scoring_as_json(given)) == given  # as the event of the start has it
    logs.reader = OutcomeReader(
        logs.ledger,
        logs.places,
        logs.keyring,
        signatures=logs.signatures.__getitem__,
        metrics=replace(METRICS, scoring=given),
        models=models,
    )
    logs.collect(1_500)
    paired = {rule.name for rule in rules if rule.form is Form.paired}
    with logs.engine.connect() as connection:
        return read_metrics(connection, "r", paired=paired, is_shadow=given.shadow is not None)


def mean(arm: Any) -> tuple[int, float]:
    return int(arm.units), pytest.approx(float(arm.mean))


def test_ratio_is_that_of_the_sums_and_its_error_is_of_the_delta_method(logs: Logs) -> None:
    """Units with many rows count more. The covariance matrix of the units' sums is the oracle."""
    draw, asks, tells = np.random.default_rng(1), [], []
    sums: dict[str, list[tuple[int, int]]] = {"treatment": [], "control": []}
    for unit in range(40):
        arm, rows = ("treatment", "control")[unit % 2], int(draw.integers(1, 4))
        labels = [bool(one) for one in draw.integers(0, 2, rows)]
        asks.append(asked(unit, f"U{unit}", 10 + unit, *labels, arm=arm, cpu_ms=float(rows)))
        tells += [outcome(unit, True, at(60), row=row) for row in range(rows)]
        sums[arm].append((sum(labels), rows))
    logs.predict(*asks)
    logs.tell(*tells)
    rules = (
        MetricRule(name="accuracy", score="accuracy", form=Form.ratio),
        MetricRule(name="cost", score="cpu_ms", form=Form.ratio, per=Per.rows),
        MetricRule(name="per_request", score="cpu_ms", form=Form.ratio, per=Per.requests),
    )
    found = collect(logs, *rules)
    effect = difference_of_ratios(found["accuracy"].treatment, found["accuracy"].control)
    variance, ratios = 0.0, []
    for arm in ("treatment", "control"):
        values, rows = np.array(sums[arm], float).T
        ratio = values.sum() / rows.sum()
        covariance = np.cov(values, rows)
        gradient = np.array([1.0, -ratio]) / rows.mean()
        variance += gradient @ covariance @ gradient / len(rows)
        ratios.append(ratio)
    assert effect.estimate == pytest.approx(ratios[0] - ratios[1])
    assert effect.standard_error == pytest.approx(np.sqrt(variance))
    assert difference_of_ratios(found["cost"].treatment, found["cost"].control).estimate == pytest.approx(0)
    assert float(found["per_request"].treatment.second_mean) == 1


def test_covariate_is_that_of_the_first_request(logs: Logs) -> None:
    """An arm could cause a later value. A unit without a covariate does not enter. The oracle is the pooled slope."""
    draw, rows, asks, tells = np.random.default_rng(2), [], [], []
    for unit in range(60):
        arm, before = ("treatment", "control")[unit % 2], float(draw.integers(0, 9))
        label = bool(draw.random() < before / 10)
        asks.append(asked(2 * unit, f"U{unit}", 10, label, arm=arm, features={"x": [before]}))
        asks.append(asked(2 * unit + 1, f"U{unit}", 20, label, arm=arm, features={"x": [99]}))
        tells.append(outcome(2 * unit, True, at(60)))
        rows.append((float(label), float(arm == "treatment"), before))
    logs.predict(*asks, asked(990, "none", 10, True, features={"x": [None]}))
    logs.tell(*tells, outcome(990, True, at(60)))
    rule = MetricRule(name="accuracy", score="accuracy", form=Form.adjusted, covariate="x")
    counts = collect(logs, rule)["accuracy"]
    effect: Effect = adjusted_difference(counts.treatment, counts.control)
    values, arms, before = np.array(rows).T
    inside = np.array([before[arms == one] - before[arms == one].mean() for one in (0, 1)])
    slope = sum(part @ values[arms == one] for one, part in enumerate(inside)) / (inside**2).sum()
    adjusted = values - slope * before
    assert effect.units == 60
    assert effect.estimate == pytest.approx(adjusted[arms == 1].mean() - adjusted[arms == 0].mean())


def test_cost_needs_no_outcome(logs: Logs) -> None:
    """Its unit value is the mean over its requests. A record of an older release does not say it."""
    logs.predict(
        asked(1, "A", 10, True, cpu_ms=2.0, took_ms=7.0),
        asked(2, "A", 20, True, cpu_ms=4.0, took_ms=9.0),
        asked(3, "A", 30, True),
        asked(4, "B", 10, True, arm="control", cpu_ms=5.0),
        asked(5, "C", 10, True),
    )
    found = collect(logs, MetricRule(name="cost", score="cpu_ms"), MetricRule(name="time", score="took_ms"))
    assert (mean(found["cost"].treatment), mean(found["cost"].control)) == ((1, 3.0), (1, 5.0))
    assert mean(found["time"].treatment) == (1, 8.0)


def test_segment_is_that_of_the_first_request(logs: Logs) -> None:
    """Its units are counted a second time, under a name of their own."""
    for number, (unit, x) in enumerate([("A", 1), ("B", 2), ("C", 1)]):
        logs.predict(asked(number, unit, 10, unit == "A", features={"x": [x]}))
        logs.tell(outcome(number, True, at(60)))
    logs.predict(asked(9, "B", 20, True, features={"x": [1]}))
    segments = tuple(
        SegmentRule(name=f"accuracy[x={value}]", metric="accuracy", column="x", value=value)
        for value in ("1", "2", "3")
    )
    found = collect(logs, MetricRule(name="accuracy", score="accuracy"), segments=segments)
    units = {name: mean(counts.treatment) for name, counts in found.items()}
    assert units == {
        "accuracy": (3, 1 / 3),
        "accuracy[x=1]": (2, 0.5),
        "accuracy[x=2]": (1, 0.0),
        "accuracy[x=3]": (0, 0.0),
    }


class Tenth:
    """A model whose probability is a tenth of its input. It fails above 100."""

    num_inputs = 1

    def scores(self, matrix: Matrix) -> Any:
        return np.where(np.isnan(matrix[:, 0]), 0.5, np.where(matrix[:, 0] > 100, np.nan, matrix[:, 0] / 10))


def test_paired_difference_lets_the_other_version_score_the_logged_features(logs: Logs) -> None:
    """In both arms. A request with features of before the rollout is left out. The oracle is SciPy's paired t-test."""
    draw, ours, theirs, asks, tells = np.random.default_rng(3), [], [], [], []
    for unit in range(30):
        arm, version = (("treatment", 2), ("control", 1))[unit % 2]
        x, truth = int(draw.integers(0, 11)), bool(draw.random() < 0.5)
        values: dict[str, Any] = {"arm": arm, "version": version, "features": {"x": [x]}}
        asks.append(asked(unit, f"U{unit}", 10, True, **values, as_of=at(10)))
        asks.append(asked(100 + unit, f"U{unit}", 12, True, **values))
        tells += [outcome(unit, truth, at(60)), outcome(100 + unit, not truth, at(60))]
        logged, scored = (0.75 - truth) ** 2, (x / 10 - truth) ** 2
        ours.append(logged if version == 2 else scored)
        theirs.append(scored if version == 2 else logged)
    logs.predict(*asks)
    logs.tell(*tells)
    counts = collect(logs, PAIRED, models=lambda version: Model(FLAGS, Tenth()))["brier"]
    effect = paired_difference(counts.treatment)
    expected = stats.ttest_rel(ours, theirs)
    assert effect.estimate == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert effect.estimate / effect.standard_error == pytest.approx(expected.statistic)
    [split] = counts.splits
    assert (split.treatment, split.control) == (15, 15)


def test_version_without_a_score_gets_the_worst_one(logs: Logs) -> None:
    """Otherwise it could hide the rows that it fails on."""
    logs.predict(asked(1, "A", 10, True, arm="control", version=1, features={"x": [200]}, as_of=at(10)))
    logs.tell(outcome(1, True, at(60)))
    counts = collect(logs, PAIRED, models=lambda version: Model(FLAGS, Tenth()))["brier"]
    assert mean(counts.treatment) == (1, 1 - 0.0625)


def test_paired_versions_need_the_same_inputs(logs: Logs) -> None:
    """The message names the input."""
    logs.signatures = {1: FLAGS, 2: replace(FLAGS, inputs=(InputSpec(name="z", dtype="int64"),))}
    with pytest.raises(RolloutError, match="only the champion reads 'x'"):
        collect(logs, PAIRED, models=lambda version: Model(FLAGS, Tenth()))


def copied(number: int, label: bool, **changes: Any) -> PredictionRecord:
    """Return the shadow's answer to a request."""
    return asked(500 + number, "", 11, label, arm="shadow", request_id=f"r{number}", version=2, **changes)


def test_shadow_is_judged_by_its_copies(logs: Logs) -> None:
    """A unit counts once. Requests without a copy, and copies for another version, do not count."""
    for number, unit in enumerate(["A", "A", "B", "C", "D", "E", "F"]):
        logs.predict(asked(number, unit, 10, True, arm="outside", version=1, cpu_ms=2.0))
        logs.tell(outcome(number, True, at(60)))
    nothing: dict[str, Any] = {"predictions": [], "entities": [], "features": {}}
    logs.predict(
        copied(0, True, cpu_ms=3.0),
        copied(1, False, cpu_ms=5.0),  # disagrees
        copied(2, True, fault=COPY_REFUSED, **nothing),
        copied(3, True, took_ms=90.0),  # slow
        replace(copied(4, True), fault="gave no score", predictions=[]),
        replace(copied(4, True, **nothing), prediction_id="sender", fault=COPY_FAILED),
        replace(copied(5, True), version=3),
    )
    rules = (PAIRED, MetricRule(name="cost", score="cpu_ms", form=Form.paired))
    found = collect(logs, *rules, shadow=ShadowRule(slow_ms=50))
    with logs.engine.connect() as connection:
        counts = read_shadow_counts(connection, "r")
    assert counts == {"units": 4, "disagreement": 1, "refusal": 1, "slow": 1, "failure": 1}
    # A: (0.0625 - 0.0625, 0.5625 - 0.0625) / 2; B and D: the worst score, 1, minus 0.0625; C: no difference.
    assert mean(found["brier"].treatment) == (4, (0.25 + 0.9375 + 0 + 0.9375) / 4)
    assert mean(found["cost"].treatment) == (1, 2.0)
    assert found["brier"].splits == ()


def test_full_shadow_holds_and_counts_no_unit_twice(logs: Logs) -> None:
    """Units for which there is no room come again in later cohorts. None of their events counts."""
    store = EvidenceStore(logs.ledger.engine)
    store.register("r", Counting(max_units=3))
    for number, (unit, seconds) in enumerate([("A", 10), ("B", 20), ("C", 110), ("D", 120), ("C", 710)]):
        copy = copied(number, True, time=at(seconds + 1))
        logs.predict(asked(number, unit, seconds, True, arm="outside", version=1), copy)
        logs.tell(outcome(number, True, at(seconds + 5)))
    found = collect(logs, PAIRED, shadow=ShadowRule(slow_ms=50))
    policy = Policy(
        steps=(Step(weight=100),),
        event_guardrails=(EventGuardrail(event=UnitEvent.failure, limit=0.05),),
        deadline_s=DAY_S,
        is_shadow=True,
        max_units=3,
    )
    the_plan = plan(policy, Traffic(units_per_hour=1_000, events={UnitEvent.failure: 0.01}))
    evidence = store.evidence(
        "r",
        the_plan,
        step=0,
        step_started_at=START,
        started_at=START,
        now=START + dt.timedelta(seconds=1_500),
    )
    assert (evidence.watched_units, int(found["brier"].treatment.units)) == (2, 2)
    assert evidence.stored_units >= 3
    decision = judge(the_plan, evidence)
    assert decision.verdict is Verdict.hold
    assert any(reason.startswith("too many units") for reason in decision.reasons)
