"""The edge follows its machine's journal of rollbacks, with a real HAProxy, whatever the ledger does."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent, RolloutWeightChanged
from tests.samples.journaled import ROLLBACK, new_journal
from tests.samples.rollouts import ROLLED_BACK, STARTED
from tests.servers.controller import CHAMPION_ONLY, SPLIT, Running
from tests.servers.polling import wait_until

MORE = RolloutWeightChanged(model="m", rollout="r", weight=30)


class SilentLedger(Ledger):
    """A ledger that cannot be read until the test allows it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.answers = threading.Event()

    def head(self) -> int:
        self.answers.wait(20)
        return super().head()


def journal_a_rollback(running: Running) -> None:
    running.journal.append(ROLLBACK)
    wait_until(lambda: running.split() == CHAMPION_ONLY)


def serves(running: Running, split: str) -> bool:
    """Return whether a worker of HAProxy serves with this split."""
    with contextlib.suppress(OSError):  # the worker starts
        return running.split() == split
    return False


def test_journaled_rollback_is_applied_and_stays(running: Running) -> None:
    """The ledger goes on meanwhile. The journal is emptied before the edge has read the end of the rollout."""
    assert running.split() == SPLIT
    journal_a_rollback(running)
    running.tell_and_wait(MORE)
    assert running.split() == CHAMPION_ONLY
    running.journal.clear((ROLLBACK,))
    running.wait_for_targets(2)
    assert running.split() == CHAMPION_ONLY
    another: LedgerEvent = STARTED.__class__(**{**STARTED.payload(), "rollout": "r2"})
    running.tell_and_wait(ROLLED_BACK, another)
    assert running.split() == SPLIT.replace("|r|", "|r2|")


@pytest.mark.parametrize("journaled_before", [False, True])
def test_edge_that_starts_during_the_outage_follows_the_journal(
    running: Running, journaled_before: bool
) -> None:
    """It uses the map of the earlier controller, and changes it. Afterwards it goes on with the ledger."""
    running.stop()
    if journaled_before:
        running.journal.append(ROLLBACK)
    running.ledger = ledger = SilentLedger(str(running.ledger.engine.url))
    running.begin()
    running.thread.start()
    if not journaled_before:
        wait_until(lambda: serves(running, SPLIT))
        running.journal.append(ROLLBACK)
    wait_until(lambda: serves(running, CHAMPION_ONLY))
    wait_until(lambda: Path(running.settings.map_file).read_text() == f"m {CHAMPION_ONLY}\n")
    ledger.answers.set()
    running.tell_and_wait(MORE)
    assert running.split() == CHAMPION_ONLY


def test_journal_that_cannot_be_read_stops_nothing(running: Running) -> None:
    """What was read before stays in effect, and the edge still follows the ledger."""
    file = running.haproxy_file.with_name("rollbacks.journal")
    journal_a_rollback(running)
    file.chmod(0o666)
    running.tell_and_wait(MORE)
    assert running.split() == CHAMPION_ONLY
    file.unlink()
    running.tell_and_wait(ROLLED_BACK)
    assert (running.split(), new_journal(file.parent).read()) == (CHAMPION_ONLY, ())
