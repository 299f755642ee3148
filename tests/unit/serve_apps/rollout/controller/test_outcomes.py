"""The controller's process reads outcomes for rollouts with metrics, and their goals decide."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.errors import AccessDenied
from cluster.ledger import Ledger
from cluster.runtime import Model
from cluster.security.keys.store import KeyStore
from cluster.statistics.policy import UnitEvent
from serve_apps.rollout.controller.outcomes import OutcomeCollector, Versions
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.policy.sections import BaselineSpec, EventGuardrailSpec, GoalSpec, TrafficSpec
from serve_apps.rollout.policy.spec import MetricSpec, Mode, RolloutSpec
from tests.samples.policies import STARTER, WITH_POLICY
from tests.samples.record_log import FLAGS, outcome
from tests.samples.rollouts import DEPLOYED, STARTED
from tests.unit.serve_apps.rollout.evidence.test_outcomes import START, Logs, asked

SPEC = RolloutSpec(
    mode=Mode.ab,
    metrics=[MetricSpec(name="accuracy"), MetricSpec(name="calibration", quality="brier")],
    goals=[GoalSpec(metric="accuracy", expected=0.2)],
    event_guardrails=[EventGuardrailSpec(event=UnitEvent.failure)],
    traffic=TrafficSpec(
        units_per_hour=1000,
        events={"failure": 0.01},
        metrics={"accuracy": BaselineSpec(mean=0.8, deviation=0.4)},
        outcome_delay_s=400,
    ),
)


def no_model(_model: str, _version: int, _store: KeyStore) -> Model:
    raise AssertionError("No metric is paired.")


def started(logs: Logs, root: Path) -> Logs:
    """Start the rollout of the policy at `START`."""
    ledger = Ledger(f"sqlite:///{root}/ledger.db", clock=lambda: START)
    policy = replace(WITH_POLICY, plan=as_json(SPEC.plan()), scoring=SPEC.scoring())
    for event in (*DEPLOYED, STARTED, policy):
        ledger.append(event, actor="ann")
    ledger.close()
    return logs


def test_outcomes_of_a_rollout_with_metrics_are_read(tmp_path: Path) -> None:
    """With the starter's keys. A unit enters when its window, `outcome_delay_s`, is over."""
    logs, seen = started(Logs(tmp_path, {1: FLAGS, 2: FLAGS}), tmp_path), []

    def keys(starter: dict[str, Any]) -> KeyStore:
        seen.append(starter)
        return logs.keyring

    collector = OutcomeCollector(
        logs.ledger,
        logs.places,
        Versions(lambda model, version, store: logs.signatures[version], no_model),
        keys,
    )
    logs.predict(asked(1, "A", 10, True), asked(2, "B", 20, True, arm="control", version=1))
    logs.tell(outcome(1, True, (START + dt.timedelta(seconds=30)).isoformat()))
    logs.tell(outcome(2, False, (START + dt.timedelta(seconds=30)).isoformat()))
    assert collector.collect_once(now=START + dt.timedelta(seconds=499)) == 0
    assert collector.collect_once(now=START + dt.timedelta(seconds=500)) == 1
    assert seen == [STARTER]
    metrics = logs.metrics()
    assert {name: float(counts.treatment.mean) for name, counts in metrics.items()} == {
        "accuracy": 1.0,
        "calibration": 0.0625,
    }
    logs.ledger.close()


def test_refused_keys_are_asked_for_again(tmp_path: Path) -> None:
    """The failure of one rollout ends nothing."""
    logs, allowed = started(Logs(tmp_path, {1: FLAGS, 2: FLAGS}), tmp_path), []

    def keys(_starter: dict[str, Any]) -> KeyStore:
        if not allowed:
            raise AccessDenied("no")
        return logs.keyring

    collector = OutcomeCollector(
        logs.ledger, logs.places, Versions(lambda model, version, store: FLAGS, no_model), keys
    )
    logs.predict(asked(1, "A", 10, True))
    logs.tell(outcome(1, True, (START + dt.timedelta(seconds=30)).isoformat()))
    assert collector.collect_once(now=START + dt.timedelta(seconds=500)) == 0
    allowed.append(True)
    assert collector.collect_once(now=START + dt.timedelta(seconds=500)) == 1
    logs.ledger.close()
