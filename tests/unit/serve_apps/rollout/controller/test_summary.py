"""Each rollout with a policy that has ended has one summary, whoever ended it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import PolicyEnded, PolicySummarised, RolloutStarted
from cluster.statistics.evidence import Evidence
from serve_apps.rollout import transitions
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.history import read_history
from serve_apps.rollout.serving_state import read_states
from tests.samples.policies import EARLY, FAILING, HEALTHY, EvidenceDouble, permitted, started_ledger


def looked(ledger: Ledger, counts: Evidence, looks: int) -> EvidenceDouble:
    double = EvidenceDouble(counts)
    acting = Controller(ledger, double, refusal=permitted)
    for _ in range(looks):
        acting.check_once()
    return double


def summaries(ledger: Ledger) -> list[dict[str, Any]]:
    return [entry.payload for entry in ledger.entries(PolicySummarised)]


def test_promotion_has_one_summary_with_steps_and_effects(url: str) -> None:
    """It is appended before the counts are forgotten. Another controller appends none."""
    ledger = started_ledger(url)
    looked(ledger, HEALTHY, 5)
    looked(ledger, HEALTHY, 2)
    (summary,) = summaries(ledger)
    assert (summary["outcome"], summary["starter"], summary["decider"]) == (
        "promoted",
        "ann",
        "system:rollouts",
    )
    assert [step["weight"] for step in summary["steps"]] == [20, 30, 50]
    assert all(step["seconds"] >= 0 for step in summary["steps"])
    assert summary["requests"] == {"treatment": 7, "control": 8, "none": 1}
    (effect,) = summary["effects"]
    assert (effect["kind"], effect["name"], effect["units"]) == ("guardrail", "failure", 20_000)
    assert 0 < effect["estimate"] < effect["high"] < effect["margin"]


def test_rollback_by_an_operator_is_summarised_too(url: str) -> None:
    """The decider is the operator, also if the next rollout has started already."""
    ledger = started_ledger(url)
    looked(ledger, EARLY, 1)
    run, rollout = read_history(ledger, "m").run, read_states(ledger)["m"].rollout
    assert rollout is not None
    ending = transitions.Ending(model="m", rollout=rollout, run=run, reason="aborted by command")
    for event in transitions.rollback(ending, outcome="aborted"):
        ledger.append(event, actor="bob")
    started = next(entry.event() for entry in ledger.entries(RolloutStarted))
    assert isinstance(started, RolloutStarted)
    ledger.append(replace(started, rollout="r2"), actor="bob")
    double = looked(ledger, FAILING, 2)
    (summary,) = summaries(ledger)
    assert (summary["outcome"], summary["decider"]) == ("aborted", "bob")
    assert double.forgotten == ["r"]


@pytest.mark.parametrize("payload", [{}, {"steps": []}])
def test_end_by_an_older_release_has_no_summary(tmp_path: Path, payload: dict[str, Any]) -> None:
    """Otherwise an update would report rollouts of last year."""
    ledger = started_ledger(f"sqlite:///{tmp_path}/ledger.db")
    ended = PolicyEnded(
        model="m",
        rollout="r",
        version=2,
        outcome="rolled_back",
        reason="",
        starter="ann",
        started_at="2025-01-01T00:00:00.000000+00:00",
        weight=20,
        decisions=1,
        **payload,
    )
    ledger.append(ended, actor="system:rollouts")
    looked(ledger, EARLY, 1)
    assert summaries(ledger) == []
