"""The loop of the controller: one of two acts, and a failure of the database does not end it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import PolicyDecided, RolloutPromoted
from cluster.metrics import new_registry
from cluster.registry import Registry
from cluster.security.authorization.policy import Policy
from cluster.storage import Layout
from serve_apps.rollout.controller import looking
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.controller.leadership import Leadership
from serve_apps.rollout.controller.metrics import ControllerMetrics
from serve_apps.rollout.controller.rights import StarterRights
from serve_apps.rollout.outage.known import KnownRollouts
from serve_apps.rollout.outage.local_evidence import LocalEvidence
from serve_apps.rollout.outage.watch import OutageWatch
from tests.samples.journaled import new_journal
from tests.samples.model_versions import registered
from tests.samples.policies import STARTER, EvidenceDouble, permitted, started_ledger
from tests.servers.postgresql import end_connections, new_database

DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "EVERY_S", 0.05)


def wait_until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def running(url: str, file: Path, double: EvidenceDouble) -> Iterator[ControllerMetrics]:
    """Run a controller in a thread until the end of the block."""
    ledger, stopped = Ledger(url), threading.Event()
    metrics = ControllerMetrics(new_registry())
    arguments = (
        Controller(ledger, double, refusal=permitted),
        Leadership(ledger.engine, file),
        metrics,
        stopped,
        OutageWatch(
            new_journal(file.parent), KnownRollouts(file.with_name("known")), LocalEvidence(file.parent)
        ),
    )
    thread = threading.Thread(target=looking.look_until_stopped, args=arguments)
    thread.start()
    try:
        yield metrics
    finally:
        stopped.set()
        thread.join()


def acts(metrics: ControllerMetrics) -> bool:
    return bool(metrics.acts._value.get())


def test_one_of_two_controllers_acts(url: str, tmp_path: Path) -> None:
    """When the first ends, the other one acts. Together they promote once."""
    ledger, file = started_ledger(url), tmp_path / "lock"
    first, second = EvidenceDouble(), EvidenceDouble()
    with running(url, file, second) as other:
        wait_until(lambda: acts(other))
        with running(url, file, first) as waiting:
            wait_until(lambda: waiting.last_check._value.get() > 0)
            assert not acts(waiting)
            wait_until(lambda: ledger.last(RolloutPromoted) is not None)
    assert first.asked == []
    assert len(list(ledger.entries(PolicyDecided))) == 3


def test_failure_of_the_database_does_not_end_the_loop(server: str, tmp_path: Path) -> None:
    """The controller gets the lock again, and goes on."""
    url = new_database(server, secrets.token_hex(4))
    ledger, double = started_ledger(url), EvidenceDouble()
    failed = threading.Event()

    def fail_once() -> None:
        if not failed.is_set():
            failed.set()
            end_connections(ledger.engine)

    double.before = fail_once
    with running(url, tmp_path / "unused", double):
        wait_until(lambda: failed.is_set() and promoted(url))


def test_unknown_failure_does_not_end_the_loop(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged with its stack trace, and the next look succeeds."""
    started_ledger(url)
    failed = threading.Event()
    original = Controller.check_once

    def fail_once(controller: Controller) -> int:
        if not failed.is_set():
            failed.set()
            raise OverflowError("date value out of range")
        return original(controller)

    monkeypatch.setattr(Controller, "check_once", fail_once)
    with running(url, tmp_path / "lock", EvidenceDouble()):
        wait_until(lambda: promoted(url))
    assert "date value out of range" in caplog.text


def promoted(url: str) -> bool:
    return Ledger(url).last(RolloutPromoted) is not None


@pytest.mark.parametrize(("role", "refused"), [("ml_engineer", False), ("auditor", True)])
def test_rights_of_the_starter_are_those_of_the_policies(tmp_path: Path, role: str, refused: bool) -> None:
    """They are decided at the time of the change."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.append(registered("m", 2), actor="bob")
    rights = StarterRights(
        Registry(ledger, Layout(str(tmp_path))),
        Policy.load(region="local"),
        region="local",
        environment="dev",
    )
    refusal = rights.refusal({**STARTER, "role": role}, "m", 2)
    assert refusal == ("ann may not roll out version 2 of 'm' any more" if refused else "")
