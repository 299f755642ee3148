"""A journaled rollback gets into the ledger once, and the ledger wins if the rollout ended otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import (
    LedgerEvent,
    PolicyEnded,
    RollbackJournaled,
    RolloutRolledBack,
    RolloutWeightChanged,
)
from serve_apps.rollout import transitions
from serve_apps.rollout.history import read_history
from serve_apps.rollout.outage.settling import settle
from serve_apps.rollout.replay import replayed_lines
from serve_apps.rollout.serving_state import read_states
from tests.samples.journaled import journaled
from tests.samples.policies import EVENTS, started_ledger
from tests.samples.rollouts import STARTED

AHEAD = RolloutWeightChanged(model="m", rollout="r", weight=30)
"""Another machine has taken the next step meanwhile."""


def outcomes(ledger: Ledger) -> list[str]:
    return [entry.payload["outcome"] for entry in ledger.entries(RollbackJournaled)]


@pytest.mark.parametrize("between", [(), (AHEAD,)])
def test_running_rollout_is_rolled_back(url: str, tmp_path: Path, between: tuple[LedgerEvent, ...]) -> None:
    """All events are in one transaction, the journal is empty afterwards, and a replay confirms the decision."""
    ledger, journal = started_ledger(url), journaled(tmp_path)
    for event in between:
        ledger.append(event, actor="ann")
    settle(ledger, journal, actor="system:rollouts")
    types = [entry.type for entry in ledger.entries(after=len(EVENTS) + len(between))]
    assert types == ["RollbackJournaled", "RolloutRolledBack", "PolicyEnded", "VersionKeptWarm"]
    assert outcomes(ledger) == ["applied"]
    assert read_states(ledger)["m"].rollout is None
    assert journal.read() == ()
    ended = ledger.last(PolicyEnded)
    assert ended is not None
    assert ended.payload["reason"].startswith("while the ledger did not answer: failure: 40 units")
    assert "1 decisions of 1 rollouts are as recorded" in list(replayed_lines(ledger.entries()))


def test_second_time_changes_nothing(url: str, tmp_path: Path) -> None:
    """The journal of a process that was killed before it was emptied is settled again."""
    ledger = started_ledger(url)
    settle(ledger, journaled(tmp_path), actor="a")
    head = ledger.head()
    journal = journaled(tmp_path)
    settle(ledger, journal, actor="a")
    assert (ledger.head(), journal.read()) == (head, ())


def promoted_ledger(url: str) -> Ledger:
    ledger = started_ledger(url)
    history = read_history(ledger, "m")
    rollout = read_states(ledger)["m"].rollout
    assert rollout is not None
    ending = transitions.Ending(model="m", rollout=rollout, run=history.run, reason="better")
    for event in transitions.promotion(ending, champion=1):
        ledger.append(event, actor="ann")
    return ledger


def test_promotion_meanwhile_is_a_conflict_and_stays(url: str, tmp_path: Path) -> None:
    ledger = promoted_ledger(url)
    settle(ledger, journaled(tmp_path), actor="a")
    assert outcomes(ledger) == ["conflict"]
    assert read_states(ledger)["m"].champion_version == 2


@pytest.mark.parametrize(("is_rolled_back", "outcome"), [(False, "conflict"), (True, "already_rolled_back")])
def test_promotion_is_a_conflict_also_if_the_next_rollout_runs(
    tmp_path: Path, is_rolled_back: bool, outcome: str
) -> None:
    """Unless the promotion was taken back."""
    ledger = promoted_ledger("sqlite://")
    if is_rolled_back:
        ledger.append(RolloutRolledBack(model="m", rollout="r", reason=""), actor="ann")
    ledger.append(replace(STARTED, rollout="r2", treatment_version=3, champion_version=2), actor="ann")
    settle(ledger, journaled(tmp_path), actor="a")
    assert outcomes(ledger) == [outcome]
    assert list(replayed_lines(ledger.entries()))


def test_rollback_of_an_unknown_rollout_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise a replay of the ledger would fail for ever."""
    ledger, journal = Ledger("sqlite://"), journaled(tmp_path)
    settle(ledger, journal, actor="a")
    assert (outcomes(ledger), journal.read()) == ([], ())
    assert "the ledger has no such rollout" in caplog.text
    assert list(replayed_lines(ledger.entries()))


def test_rollback_meanwhile_is_recorded(url: str, tmp_path: Path) -> None:
    ledger = started_ledger(url)
    ledger.append(RolloutRolledBack(model="m", rollout="r", reason="by request"), actor="ann")
    settle(ledger, journaled(tmp_path), actor="a")
    assert outcomes(ledger) == ["already_rolled_back"]
    assert len(list(ledger.entries(RolloutRolledBack))) == 1
