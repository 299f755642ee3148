"""A version that a rollout took out of use stays deployed for a time. Then the controller ends it, once."""

from __future__ import annotations

import datetime as dt
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import (
    ApplicationEnded,
    DeploymentRemoved,
    LedgerEvent,
    ModelDeployed,
    ShadowStarted,
)
from cluster.registry import Registry
from cluster.settings import PlatformConfig, ReplicaConfig, StorageConfig
from cluster.storage import Layout
from serve_apps.deploy import serving
from serve_apps.deployed_settings import idle_cost, store_settings
from serve_apps.rollout.controller.controller import CONFIRMING_LOOKS, Controller
from serve_apps.rollout.controller.ending import ApplicationEnder
from serve_apps.rollout.history import read_histories, read_history
from serve_apps.rollout.serving_state import read_states
from serve_apps.rollout.transitions import ACTOR
from serve_apps.rollout.warm import OpenRemovals, warm_status
from tests.samples.model_versions import registered
from tests.samples.policies import FAILING, EvidenceDouble, SetClock, permitted, started_ledger
from tests.samples.rollouts import STARTED, deployed
from tests.samples.watches import promoted_ledger

START = dt.datetime.now(dt.UTC)
LATER = START + dt.timedelta(hours=25)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> dt.datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def promoted(path: Path, clock: Clock) -> tuple[Ledger, Controller]:
    ledger, acting, _ = promoted_ledger(f"sqlite:///{path}/ledger.db", holdback=True, clock=clock)
    return ledger, acting


def removed(ledger: Ledger) -> list[tuple[object, object]]:
    """Return the versions of the controller's removals, and who did them."""
    found = (entry for entry in ledger.entries() if entry.type == "DeploymentRemoved")
    return [(entry.payload["version"], entry.actor) for entry in found]


def test_predecessor_is_removed_after_the_watch_and_not_before(tmp_path: Path, clock: Clock) -> None:
    """First the watch ends, so the holdback's units go to the champion. Nothing starts the version again."""
    ledger, acting = promoted(tmp_path, clock)
    for number in (1, 2):
        ledger.append(registered("m", number), actor="bob")
    acting.check_once()
    assert removed(ledger) == []
    clock.now = LATER
    for _ in range(2 * CONFIRMING_LOOKS):
        acting.check_once()
    assert removed(ledger) == [(1, ACTOR)]
    kinds = [entry.type for entry in ledger.entries()]
    assert kinds.index("WatchEnded") < kinds.index("DeploymentRemoved")
    registry = Registry(ledger, Layout(str(tmp_path)))
    restored = serving(read_states(ledger), read_histories(ledger), registry)
    assert [version.version for version in restored] == [2]


@pytest.mark.parametrize(
    "event",
    [
        replace(STARTED, rollout="r2", treatment_version=1, champion_version=2),
        ShadowStarted(model="m", version=1, app="m-v1", share=10.0),
    ],
)
def test_version_in_use_is_not_removed(tmp_path: Path, clock: Clock, event: LedgerEvent) -> None:
    """An operator uses the predecessor again, as a treatment or a shadow."""
    ledger, acting = promoted(tmp_path, clock)
    ledger.append(event, actor="ann")
    clock.now = LATER
    for _ in range(2 * CONFIRMING_LOOKS):
        acting.check_once()
    assert removed(ledger) == []


def test_loser_of_a_rollback_is_removed_too(tmp_path: Path) -> None:
    """After the same time as a predecessor."""
    times = itertools.chain([START, START], itertools.repeat(LATER))
    ledger = started_ledger(f"sqlite:///{tmp_path}/ledger.db")
    acting = Controller(
        ledger, EvidenceDouble(FAILING), refusal=permitted, clock=SetClock(lambda: next(times))
    )
    for _ in range(2 + CONFIRMING_LOOKS):
        acting.check_once()
    assert removed(ledger) == [(2, ACTOR)]


def test_show_says_until_when_a_version_stays_and_what_it_costs(tmp_path: Path, clock: Clock) -> None:
    """The cost is that of the smallest number of replicas, with the settings of its deployment."""
    ledger, _ = promoted(tmp_path, clock)
    replica = ReplicaConfig(min_replicas=2, num_cpus=0.5, num_gpus=1)
    config = PlatformConfig(storage=StorageConfig(root=str(tmp_path)), replica=replica)
    store_settings(config, "m-v1")
    state = read_states(ledger)["m"]
    default = PlatformConfig(storage=config.storage)
    (shown,) = warm_status(read_history(ledger, "m"), state, lambda app: idle_cost(default, app))
    assert (shown["version"], shown["rollout"]) == (1, "r")
    assert shown["cost"] == {"replicas": 2, "cpus": 1.0, "gpus": 2.0}
    assert dt.datetime.fromisoformat(shown["until"]) - START < dt.timedelta(hours=24, minutes=1)


class Command:
    """A double of the command that ends applications. It can fail at first."""

    def __init__(self, ledger: Ledger, *, failures: int = 0) -> None:
        self.ledger, self.failures, self.calls = ledger, failures, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError("no head")
        for entry in list(OpenRemovals(ledger=self.ledger).entries(lambda: read_states(self.ledger))):
            event = ApplicationEnded(model="m", version=1, app="m-v1", removed_seq=entry.seq)
            self.ledger.append(event, actor="system:supervisor")


def removed_ledger(path: Path, clock: Clock) -> Ledger:
    ledger, acting = promoted(path, clock)
    clock.now = LATER
    for _ in range(2 * CONFIRMING_LOOKS):
        acting.check_once()
    return ledger


def test_removed_application_is_ended_once_also_after_failures(tmp_path: Path, clock: Clock) -> None:
    """A failed command is repeated. A new process goes on from the ledger."""
    ledger = removed_ledger(tmp_path, clock)
    command = Command(ledger, failures=1)
    ender = ApplicationEnder(ledger, command)
    assert [ender.end_once() for _ in range(4)] == [False, True, True, True]
    assert command.calls == 2
    assert ApplicationEnder(ledger, command).end_once()
    assert command.calls == 2


def test_version_that_is_deployed_again_is_not_ended(tmp_path: Path, clock: Clock) -> None:
    """The operator deployed it after its removal, before its application ended."""
    ledger = removed_ledger(tmp_path, clock)
    again = deployed(1)
    assert isinstance(again, ModelDeployed)
    ledger.append(again, actor="ann")
    command = Command(ledger)
    assert ApplicationEnder(ledger, command).end_once()
    assert command.calls == 0


def test_removal_by_an_operator_is_not_ended(tmp_path: Path, clock: Clock) -> None:
    """The operator's command ends the application itself."""
    ledger, _ = promoted(tmp_path, clock)
    ledger.append(DeploymentRemoved(name="m", version=1, app="m-v1", reason=""), actor="ann")
    assert not list(OpenRemovals(ledger=ledger).entries(lambda: read_states(ledger)))
