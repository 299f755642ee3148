"""kill -9 of the controller at any point changes nothing: the next one continues, and the events are the same."""

from __future__ import annotations

import signal
from operator import itemgetter
from typing import Any

import pytest

from cluster.ledger import Ledger
from cluster.ledger.chain import verify_chain
from serve_apps.rollout.controller.controller import Controller
from tests.processes import forks
from tests.processes.dying_ledger import DyingLedger, Point, die
from tests.samples.policies import EvidenceDouble, permitted, started_ledger

LOOKS = 3
NO_TIMES = dict.fromkeys(("started_at", "ended_at", "steps"))


def run_until_killed(url: str, point: Point, look: int) -> None:
    """Look at the rollout, and die at one point of one look."""
    ledger, double = DyingLedger(url), EvidenceDouble()
    acting = Controller(ledger, double, refusal=permitted)
    for number in range(LOOKS):
        if number == look:
            ledger.point = point
            double.before = die if point is Point.before_counts else double.before
        acting.check_once()


def finished(ledger: Ledger) -> list[tuple[str, dict[str, Any]]]:
    """Let a new controller finish the rollout, and return all events without their times, in the order of their types.

    A summary that is missing after a kill is appended after the next look, so its place can differ.
    """
    acting = Controller(ledger, EvidenceDouble(), refusal=permitted)
    for _ in range(LOOKS + 1):
        acting.check_once()
    entries = list(verify_chain(ledger.entries()))
    return sorted(((entry.type, entry.payload | NO_TIMES) for entry in entries), key=itemgetter(0))


@pytest.mark.parametrize("point", Point)
@pytest.mark.parametrize("look", [0, LOOKS - 1])
def test_killed_controller_changes_nothing(url: str, point: Point, look: int) -> None:
    """It dies during a step or during the promotion. The events are those of a controller that was not killed."""
    expected = finished(started_ledger("sqlite://"))
    ledger = started_ledger(url)
    process = forks.context().Process(target=run_until_killed, args=(url, point, look))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert finished(ledger) == expected
