"""Before a step, the version that gets more units has enough replicas, and the champion keeps its own."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import (
    PolicyDecided,
    ReplicasRequested,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutWeightChanged,
    VersionKeptWarm,
)
from serve_apps.replica import requested as following
from serve_apps.replica.requested import RequestedNumber
from serve_apps.rollout.capacity.requested import RequestedReplicas
from serve_apps.rollout.capacity.scaling import MAX_WAIT_S, NextStep, StepScaling, needed_replicas
from serve_apps.rollout.capacity.serve import Capacity, read_capacities
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.replay import replayed_lines
from tests.samples.policies import FAILING, EvidenceDouble, permitted, started_ledger
from tests.servers.polling import wait_until


class Serve:
    """A fake of Serve, and a clock."""

    def __init__(self, *, champion: int = 6, treatment: int = 1, maximum: int = 8) -> None:
        self.champion = Capacity(ready=champion, minimum=1, maximum=8)
        self.treatment = Capacity(ready=treatment, minimum=1, maximum=maximum)
        self.error: Exception | None = None
        self.late_s = 0.0

    def __call__(self) -> dict[str, Capacity]:
        if self.error is not None:
            raise self.error
        return {"m-v1": self.champion, "m-v2": self.treatment}

    def now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.late_s)


def controller(ledger: Ledger, serve: Serve, double: EvidenceDouble | None = None) -> Controller:
    scaling = StepScaling(ledger, serve, clock=serve.now)
    return Controller(ledger, double or EvidenceDouble(), refusal=permitted, scaling=scaling)


def requests(ledger: Ledger) -> dict[int, int]:
    """Return the requested number of each version that is in effect now."""
    read = RequestedReplicas(ledger)
    read.update()
    found = {version: read.find("m", version, now=dt.datetime.now(dt.UTC)) for version in (1, 2)}
    return {version: one.replicas for version, one in found.items() if one is not None}


def not_done(ledger: Ledger) -> str:
    entry = ledger.last(PolicyDecided)
    assert entry is not None
    return str(entry.payload["not_done"])


@pytest.mark.parametrize(
    ("champion", "weight", "expected"),
    [(6, 30, 2), (6, 50, 3), (6, 100, 6), (1, 1, 1), (10, 100, 8), (10, 20, 2)],
)
def test_share_of_the_champions_replicas(champion: int, weight: float, expected: int) -> None:
    """At least the minimum, and at most the maximum."""
    bounds = Capacity(ready=1, minimum=1, maximum=8)
    assert needed_replicas(champion, weight, bounds) == expected
    assert needed_replicas(champion, weight, Capacity(ready=4, minimum=4, maximum=8)) == max(expected, 4)


def test_step_waits_for_the_replicas(url: str) -> None:
    """The decision says how many are missing. A controller that starts again requests nothing twice."""
    ledger, serve = started_ledger(url), Serve()
    controller(ledger, serve).check_once()
    assert not_done(ledger) == "scaling challenger: 1 of 2 replicas ready"
    assert requests(ledger) == {1: 6, 2: 2}
    controller(ledger, serve).check_once()
    assert len(list(ledger.entries(ReplicasRequested))) == 2
    assert ledger.last(RolloutWeightChanged) is None
    serve.treatment = Capacity(ready=2, minimum=1, maximum=8)
    controller(ledger, serve).check_once()
    assert ledger.last(RolloutWeightChanged) is not None
    assert len(list(replayed_lines(ledger.entries()))) == 4


def test_promotion_needs_the_whole_capacity_and_keeps_the_predecessors(url: str) -> None:
    """The predecessor's request ends with the rollback window, or with a rollback."""
    ledger, serve = started_ledger(url), Serve(treatment=5)
    acting = controller(ledger, serve)
    for _ in range(3):
        acting.check_once()
    assert not_done(ledger) == "scaling challenger: 5 of 6 replicas ready"
    serve.treatment = Capacity(ready=6, minimum=1, maximum=8)
    serve.champion = Capacity(ready=1, minimum=1, maximum=8)  # its load went to the treatment
    acting.check_once()
    promoted = ledger.last(RolloutPromoted)
    assert promoted is not None
    assert requests(ledger) == {1: 6}
    read = RequestedReplicas(ledger)
    read.update()
    at = dt.datetime.fromisoformat(promoted.time)
    assert read.find("m", 1, now=at + dt.timedelta(hours=23.9)) is not None
    assert read.find("m", 1, now=at + dt.timedelta(hours=24.1)) is None
    ledger.append(RolloutRolledBack(model="m", rollout="r", reason=""), actor="ann")
    assert requests(ledger) == {}


def test_rollback_does_not_wait_and_ends_the_requests(url: str) -> None:
    ledger, serve, double = started_ledger(url), Serve(), EvidenceDouble()
    acting = controller(ledger, serve, double)
    acting.check_once()
    double.counts = FAILING
    acting.check_once()
    assert ledger.last(RolloutRolledBack) is not None
    assert requests(ledger) == {}


def test_fixed_number_is_recorded_and_not_waited_for(url: str) -> None:
    ledger = started_ledger(url)
    controller(ledger, Serve(maximum=1)).check_once()
    assert ledger.last(RolloutWeightChanged) is not None
    entry = ledger.last(ReplicasRequested)
    assert entry is not None
    assert (entry.payload["replicas"], entry.payload["reason"]) == (1, "the number of replicas is fixed")


def test_wait_is_bounded(url: str) -> None:
    """A full cluster must not stop a rollout for ever."""
    ledger, serve = started_ledger(url), Serve()
    controller(ledger, serve).check_once()
    serve.late_s = MAX_WAIT_S + 1
    controller(ledger, serve).check_once()
    assert ledger.last(RolloutWeightChanged) is not None


def late_step(serve: Serve, *, after_s: float) -> NextStep:
    """Return a step of a rollout whose deadline is so many seconds from now, or was before now."""
    ends_at = serve.now() + dt.timedelta(seconds=after_s)
    return NextStep(model="m", rollout="r", champion=1, version=2, weight=30, ends_at=ends_at)


@pytest.mark.parametrize("after_s", [-3600.0, 0.0, 100.0])
def test_wait_is_bounded_after_the_deadline_too(after_s: float) -> None:
    """Also if the deadline passes during the wait. Each version's replicas are requested once."""
    serve = Serve()
    ledger = Ledger("sqlite://", clock=serve.now)
    step, scaling = late_step(serve, after_s=after_s), StepScaling(ledger, serve, clock=serve.now)
    waited_s = 0.0
    while scaling.not_ready(step):
        waited_s += 5
        assert waited_s < 2 * MAX_WAIT_S
        serve.late_s = waited_s
    assert waited_s >= MAX_WAIT_S
    assert len(list(ledger.entries(ReplicasRequested))) == 2


def test_rollout_that_was_paused_past_its_deadline_waits_again() -> None:
    """Its replicas were given back meanwhile."""
    serve = Serve()
    ledger = Ledger("sqlite://", clock=serve.now)
    step, scaling = late_step(serve, after_s=3600), StepScaling(ledger, serve, clock=serve.now)
    assert scaling.not_ready(step)
    serve.late_s = 2 * 3600
    assert scaling.not_ready(step)


@pytest.mark.parametrize("window_s", [0.0, 3600.0, 48 * 3600.0])
def test_predecessor_keeps_its_replicas_as_long_as_it_is_deployed(window_s: float) -> None:
    """The window is the policy's. Another rollout's version does not matter."""
    serve, ledger = Serve(), Ledger("sqlite://")
    assert StepScaling(ledger, serve).not_ready(late_step(serve, after_s=60))
    ledger.append(RolloutPromoted(model="m", rollout="r", version=2), actor="a")
    kept = VersionKeptWarm(model="m", rollout="r", version=1, window_s=window_s)
    at = dt.datetime.fromisoformat(ledger.append(kept, actor="a").time)
    ledger.append(replace(kept, rollout="other", window_s=1e6), actor="a")
    read = RequestedReplicas(ledger)
    read.update()
    for after_s, is_kept in ((window_s / 2, window_s > 0), (window_s + 1, False)):
        assert (read.find("m", 1, now=at + dt.timedelta(seconds=after_s)) is not None) is is_kept


@pytest.mark.parametrize("error", [OSError("refused"), ValueError("another form")])
def test_serve_that_does_not_answer_stops_nothing(error: Exception) -> None:
    ledger, serve = started_ledger("sqlite://"), Serve()
    serve.error = error
    controller(ledger, serve).check_once()
    assert ledger.last(RolloutWeightChanged) is not None


def test_capacities_in_serves_answer() -> None:
    """Replicas that start or stop are not ready."""
    replicas = [{"state": state} for state in ("RUNNING", "STARTING", "RUNNING", "STOPPING")]
    scaled = {"num_replicas": 2, "autoscaling_config": {"min_replicas": 0, "max_replicas": 4}}
    fixed = {"num_replicas": 3, "autoscaling_config": None}
    content = {
        "applications": {
            name: {"deployments": {"predictor": {"replicas": replicas, "deployment_config": config}}}
            for name, config in (("m-v1", scaled), ("m-v2", fixed))
        }
    }
    assert read_capacities(content) == {
        "m-v1": Capacity(ready=2, minimum=0, maximum=4),
        "m-v2": Capacity(ready=2, minimum=3, maximum=3),
    }
    with pytest.raises(ValueError, match="another form"):
        read_capacities({"applications": {"m-v1": {}}})


def test_replica_reads_the_requested_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that of its own version."""
    monkeypatch.setattr(following, "INTERVAL_S", 0.02)
    ledger = started_ledger(f"sqlite:///{tmp_path}/ledger.db")
    numbers = [RequestedNumber(ledger, "m", version) for version in (2, 3)]
    controller(ledger, Serve()).check_once()
    wait_until(lambda: numbers[0].value == 2)
    assert numbers[1].value == 0
    ledger.append(RolloutRolledBack(model="m", rollout="r", reason=""), actor="ann")
    wait_until(lambda: numbers[0].value == 0)
    for number in numbers:
        number.close()
