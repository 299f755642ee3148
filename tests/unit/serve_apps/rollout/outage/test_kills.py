"""kill -9 at any write of the journal, or while it is appended to the ledger, loses and doubles nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.ledger.chain import verify_chain
from serve_apps.rollout.outage.settling import settle
from tests.processes import forks
from tests.processes.dying_ledger import DyingLedger, Point, die
from tests.samples.journaled import ROLLBACK, journaled, new_journal
from tests.samples.policies import EVENTS, started_ledger

CALLS = ("pwrite", "fsync")


def killed(target: Callable[..., None], *arguments: object) -> None:
    """Run a function in a process, and check that it was killed."""
    process = forks.context().Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def append_until_killed(folder: Path, call: str, after: bool) -> None:
    """Write the rollback, and die before or after a system call."""
    dying_call(call, after)
    new_journal(folder).append(ROLLBACK)


def clear_until_killed(folder: Path, call: str, after: bool) -> None:
    dying_call(call, after)
    new_journal(folder).clear((ROLLBACK,))


def dying_call(name: str, after: bool) -> None:
    original = getattr(os, name)

    def call(*arguments: object) -> None:
        if after:
            original(*arguments)
        die()

    setattr(os, name, call)


def settle_until_killed(url: str, folder: Path, point: Point) -> None:
    ledger = DyingLedger(url)
    ledger.point = point
    if point is Point.before_counts:
        die()
    settle(ledger, new_journal(folder), actor="a")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_rollback_is_written_completely_or_not_at_all(tmp_path: Path, call: str, after: bool) -> None:
    """Without it, the next process decides again and writes it."""
    new_journal(tmp_path).reserve()
    killed(append_until_killed, tmp_path, call, after)
    journal = new_journal(tmp_path)
    assert journal.read() == (() if (call, after) == ("pwrite", False) else (ROLLBACK,))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_killed_while_it_empties_the_journal(tmp_path: Path, call: str, after: bool) -> None:
    """The ledger has the rollback already. The next process appends nothing."""
    ledger = started_ledger(f"sqlite:///{tmp_path}/ledger.db")
    settle(ledger, journaled(tmp_path), actor="a")
    head = ledger.head()
    journaled(tmp_path)
    killed(clear_until_killed, tmp_path, call, after)
    settle(ledger, new_journal(tmp_path), actor="a")
    assert (ledger.head(), new_journal(tmp_path).read()) == (head, ())


@pytest.mark.parametrize("point", Point)
def test_killed_while_it_appends_to_the_ledger(url: str, tmp_path: Path, point: Point) -> None:
    """The next process continues, and the events are those of a process that was not killed."""
    ledger = started_ledger(url)
    journaled(tmp_path)
    killed(settle_until_killed, url, tmp_path, point)
    settle(ledger, new_journal(tmp_path), actor="a")
    types = [entry.type for entry in verify_chain(ledger.entries())][len(EVENTS) :]
    assert types == ["RollbackJournaled", "RolloutRolledBack", "PolicyEnded", "VersionKeptWarm"]
    assert new_journal(tmp_path).read() == ()
