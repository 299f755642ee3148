"""Monitoring results hold, ask for labels, or start retraining, if k of n chunks are out of their bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Gauge

from cluster.ledger import Ledger
from cluster.ledger.events import ModelMonitored, PolicyDecided, QualityJudged
from cluster.metrics import new_registry
from cluster.settings import SteadyStateConfig
from jobs.schedule.config import TriggerKind, TriggerSpec
from jobs.schedule.triggers import detect
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.controller.steady_state import SteadyState
from tests.samples.policies import FAILING, HEALTHY, EvidenceDouble, permitted, started_ledger
from tests.samples.rollouts import DEPLOYED

RULE = SteadyStateConfig(alerts=2, chunks=3)
MONITORED = ModelMonitored(
    model="m", variant="champion", version=1, periods={}, drift={}, inputs={}, results=""
)


def monitored(worse: str, *, version: int = 1, variant: str = "champion", **fields: Any) -> ModelMonitored:
    """Return an event. Of each chunk, `.` is good, `x` worse by outcomes, `e` by its estimate, `-` has none."""
    periods = {
        f"2020-0{number}": {
            "estimate": {"value": 0.5, "alert": letter == "e"},
            "realisation": None if letter in "e-" else {"value": 0.5, "alert": letter == "x"},
        }
        for number, letter in enumerate(worse, start=1)
    }
    return replace(MONITORED, version=version, variant=variant, periods=periods, **fields)


def steady(ledger: Ledger, registry: CollectorRegistry | None = None) -> SteadyState:
    gauge = Gauge("out_of_bounds", "versions", ["model", "version"], registry=registry or new_registry())
    return SteadyState(ledger, RULE, gauge)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    opened = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    for event in DEPLOYED:
        opened.append(event, actor="ann")
    return opened


def judged(ledger: Ledger) -> list[QualityJudged]:
    events = [entry.event() for entry in ledger.entries(QualityJudged)]
    return [event for event in events if isinstance(event, QualityJudged)]


DRIFT = {"drift": {"age": ["2020-02", "2020-03"]}}


@pytest.mark.parametrize(
    ("event", "verdict", "asks"),
    [
        (monitored("..."), None, False),
        (monitored("xx...."), None, False),
        (monitored("..e"), None, False),
        (monitored(".ee"), "hold", True),
        (monitored("...", **DRIFT), "hold", False),
        (monitored(".--", **DRIFT), "hold", True),
        (monitored("...", reconstruction=["2020-01", "2020-02"]), "hold", False),
        (monitored("...", missing={"age": ["2020-01", "2020-02"]}), "hold", False),
        (monitored(".xx"), "hold", False),
        (monitored(""), None, False),
    ],
)
def test_k_of_n_chunks_out_of_bounds_hold(
    ledger: Ledger, event: ModelMonitored, verdict: str | None, asks: bool
) -> None:
    """Only the last chunks count. Labels are asked for where outcomes are missing. It is recorded once."""
    registry = new_registry()
    acting = steady(ledger, registry)
    for _ in range(2):
        ledger.append(event, actor="monitor")
        acting.check()
    found = judged(ledger)
    assert [(one.verdict, one.asks_for_labels) for one in found] == ([(verdict, asks)] if verdict else [])
    value = registry.get_sample_value("out_of_bounds", {"model": "m", "version": "1"})
    assert value == (1.0 if verdict else None)
    steady(ledger).check()
    assert judged(ledger) == found


def test_version_that_is_well_again_is_recorded(ledger: Ledger) -> None:
    """So the alert ends."""
    registry = new_registry()
    acting = steady(ledger, registry)
    for event in (monitored(".ee"), monitored("....")):
        ledger.append(event, actor="monitor")
        acting.check()
    assert [one.verdict for one in judged(ledger)] == ["hold", "ok"]
    assert registry.get_sample_value("out_of_bounds", {"model": "m", "version": "1"}) == 0.0


def test_verdict_is_not_lost_if_the_database_fails(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next look reads the same results again."""
    acting = steady(ledger)
    ledger.append(monitored(".ee"), actor="monitor")

    def fail(*_: Any, **__: Any) -> None:
        raise sa.exc.OperationalError("INSERT", {}, OSError("gone"))

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "append_unless_changed", fail)
        with pytest.raises(sa.exc.OperationalError):
            acting.check()
    acting.check()
    acting.check()
    assert [one.verdict for one in judged(ledger)] == ["hold"]


TRIGGER = TriggerSpec(kind=TriggerKind.drift, of="m")


@pytest.mark.parametrize(
    ("predecessor", "verdict", "reason"),
    [
        ("xx", "retrain", "also for version 2"),
        ("..", "hold", "but not for version 2"),
        ("--", "hold", "no other version has outcomes"),
    ],
)
def test_harm_of_all_versions_starts_the_models_schedule(
    ledger: Ledger, predecessor: str, verdict: str, reason: str
) -> None:
    """Harm of one version does not: its guardrails roll it back. The trigger of the schedule is `drift`."""
    since = ledger.head()
    ledger.append(monitored(predecessor, version=2, variant="predecessor"), actor="monitor")
    ledger.append(monitored("xx"), actor="monitor")
    steady(ledger).check()
    (event,) = judged(ledger)
    assert event.verdict == verdict
    assert reason in event.reasons[0]
    found = detect(TRIGGER, ledger, position="", since=since, is_running=False)
    assert (found is not None) is (verdict == "retrain")
    if found is not None:
        assert found.reason.startswith("harm of all versions of model m: realised quality")
        assert detect(TRIGGER, ledger, position=found.position, since=0, is_running=False) is None
        assert (
            detect(replace(TRIGGER, of="other"), ledger, position="", since=since, is_running=False) is None
        )


def test_drift_holds_a_running_rollout_but_not_its_rollback(url: str) -> None:
    """The decision names the signal, and a replay of its counts gives the same verdict."""
    ledger = started_ledger(url)
    double = EvidenceDouble(HEALTHY)
    acting = Controller(ledger, double, refusal=permitted, steady=steady(ledger))
    ledger.append(monitored("...", **DRIFT), actor="monitor")
    acting.check_once()
    decided = ledger.last(PolicyDecided)
    assert decided is not None
    assert (decided.payload["verdict"], decided.payload["reasons"]) == (
        "hold",
        ["signal: drift of version 1"],
    )
    double.counts = FAILING
    acting.check_once()
    decided = ledger.last(PolicyDecided)
    assert decided is not None
    assert decided.payload["verdict"] == "roll_back"
