"""The controller appends what its verdicts say, once, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import (
    LedgerEvent,
    PolicyDecided,
    PolicyEnded,
    PolicyPaused,
    PolicyResumed,
    RolloutPromoted,
    RolloutRolledBack,
    RolloutWeightChanged,
)
from cluster.statistics.evidence import Evidence
from serve_apps.rollout.controller.controller import ACTOR, CONFIRMING_LOOKS, Controller
from serve_apps.rollout.controller.decisions import ENDED, PAUSED
from serve_apps.rollout.evidence.store import Counting, EvidenceStore
from serve_apps.rollout.evidence.tables import counted_rollouts
from serve_apps.rollout.history import read_history, step_at
from serve_apps.rollout.serving_state import read_states
from tests.samples.policies import EARLY, EVENTS, FAILING, HEALTHY, EvidenceDouble, permitted, started_ledger


def controller(ledger: Ledger, counts: Evidence = HEALTHY) -> tuple[Controller, EvidenceDouble]:
    double = EvidenceDouble(counts)
    return Controller(ledger, double, refusal=permitted), double


ROLLBACK = ["PolicyDecided", "RolloutRolledBack", "PolicyEnded", "VersionKeptWarm", "PolicySummarised"]


def appended(ledger: Ledger) -> list[str]:
    """Return the types of the events after the start."""
    return [entry.type for entry in ledger.entries(after=len(EVENTS))]


def last(ledger: Ledger, kind: type[LedgerEvent]) -> dict[str, object]:
    entry = ledger.last(kind)
    assert entry is not None
    return entry.payload


def test_healthy_version_takes_all_steps_and_is_promoted(url: str) -> None:
    """Each look has a decision with its counts. The events have the controller and the starter."""
    ledger = started_ledger(url)
    acting, double = controller(ledger)
    for _ in range(5):
        acting.check_once()
    step = ["PolicyDecided", "RolloutWeightChanged"]
    assert appended(ledger) == [
        *step,
        *step,
        *("PolicyDecided", "AliasMoved", "RolloutPromoted", "PolicyEnded", "WatchStarted", "VersionKeptWarm"),
        "PolicySummarised",
        "WatchDecided",
    ]
    assert [one["step"] for one in double.asked if one["rollout"] == "r"] == [
        0,
        1,
        2,
        2,
    ]  # and for the summary
    assert double.forgotten == ["r"]
    state = read_states(ledger)["m"]
    assert (state.champion_version, state.rollout) == (2, None)
    ended, decided = last(ledger, PolicyEnded), last(ledger, PolicyDecided)
    assert (ended["outcome"], ended["starter"], ended["weight"], ended["decisions"]) == (
        "promoted",
        "ann",
        50,
        3,
    )
    assert (decided["verdict"], decided["starter"]) == ("promote", "ann")
    assert {entry.actor for entry in ledger.entries(after=len(EVENTS))} == {ACTOR}


def test_same_verdict_is_recorded_once(url: str) -> None:
    """The controller looks each second, but a second look with the same verdict adds no event."""
    ledger = started_ledger(url)
    acting, double = controller(ledger, EARLY)
    for units in range(5):
        double.counts = replace(EARLY, watched_units=units)
        acting.check_once()
    assert appended(ledger) == ["PolicyDecided"]
    run = read_history(ledger, "m").run
    assert run is not None
    assert run.last is not None
    assert (run.last.verdict, [text.partition(":")[0] for text in run.last.missing]) == (
        "continue",
        ["units", "no_harm"],
    )


def test_harm_rolls_back_also_while_paused(url: str) -> None:
    """A pause stops steps, but no guardrail."""
    ledger = started_ledger(url)
    ledger.append(PolicyPaused(model="m", rollout="r", reason="lunch"), actor="ann")
    acting, _ = controller(ledger, FAILING)
    acting.check_once()
    acting.check_once()
    assert appended(ledger)[1:] == ROLLBACK
    assert read_states(ledger)["m"].rollout is None
    ended = last(ledger, PolicyEnded)
    assert ended["outcome"] == "rolled_back"
    assert "failure: 40 units of the treatment and 0 of control" in str(ended["reason"])


def test_paused_rollout_takes_no_step_until_it_is_resumed(url: str) -> None:
    """The decision says why nothing was done."""
    ledger = started_ledger(url)
    acting, _ = controller(ledger)
    ledger.append(PolicyPaused(model="m", rollout="r", reason=""), actor="ann")
    acting.check_once()
    acting.check_once()
    assert appended(ledger)[1:] == ["PolicyDecided"]
    assert last(ledger, PolicyDecided)["not_done"] == PAUSED
    ledger.append(PolicyResumed(model="m", rollout="r", reason=""), actor="ann")
    acting.check_once()
    assert last(ledger, RolloutWeightChanged)["weight"] == 30


def test_starter_without_the_right_promotes_nothing(url: str) -> None:
    """The right is checked at each change. A rollback needs no right of the starter."""
    ledger = started_ledger(url)
    double = EvidenceDouble()
    acting = Controller(
        ledger, double, refusal=lambda starter, model, version: f"{starter['subject']} may not"
    )
    acting.check_once()
    acting.check_once()
    assert appended(ledger) == ["PolicyDecided"]
    assert last(ledger, PolicyDecided)["not_done"] == "ann may not"
    double.counts = FAILING
    acting.check_once()
    assert appended(ledger)[1:] == ROLLBACK


def test_inconclusive_verdict_is_final_except_for_a_rollback(url: str) -> None:
    """Late data promote nothing. Harm still rolls back."""
    ledger = started_ledger(url)
    for weight in (30, 50):
        ledger.append(RolloutWeightChanged(model="m", rollout="r", weight=weight), actor=ACTOR)
    acting, double = controller(ledger, replace(EARLY, total_s=8 * 86_400))
    for _ in range(CONFIRMING_LOOKS):
        acting.check_once()
    assert last(ledger, PolicyDecided)["verdict"] == "inconclusive"
    double.counts = replace(HEALTHY, total_s=8 * 86_400)
    acting.check_once()
    decided = last(ledger, PolicyDecided)
    assert (decided["verdict"], decided["not_done"]) == ("promote", ENDED)
    assert read_states(ledger)["m"].champion_version == 1
    double.counts = replace(FAILING, total_s=8 * 86_400)
    acting.check_once()
    assert read_states(ledger)["m"].rollout is None


def test_change_between_reading_and_appending_is_not_overwritten(url: str) -> None:
    """An operator pauses while the controller judges: it appends nothing, and sees the pause at the next look."""
    ledger = started_ledger(url)
    acting, double = controller(ledger)
    double.before = lambda: (
        ledger.append(PolicyPaused(model="m", rollout="r", reason=""), actor="ann") and None
    )
    acting.check_once()
    assert appended(ledger) == ["PolicyPaused"]


def test_two_controllers_act_as_one(url: str) -> None:
    """The second reads the state before the first appends, so its append is refused."""
    ledger = started_ledger(url)
    first, _ = controller(ledger)
    second, double = controller(Ledger(url))
    done: list[int] = []

    def act_first() -> None:
        if not done:
            done.append(first.check_once())

    double.before = act_first
    second.check_once()
    assert appended(ledger) == ["PolicyDecided", "RolloutWeightChanged"]


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyError("x"), OverflowError("x"), RuntimeError("x")],
)
def test_one_rollout_that_cannot_be_judged_stops_no_other(url: str, error: Exception) -> None:
    """It is counted as a failure, and tried again."""
    ledger = started_ledger(url)
    acting, double = controller(ledger)

    def fail() -> None:
        raise error

    double.before = fail
    assert acting.check_once() == 1
    double.before = lambda: None
    assert acting.check_once() == 0
    assert appended(ledger) == ["PolicyDecided", "RolloutWeightChanged"]


def test_weight_of_an_older_release_is_judged_at_the_step_below_it(url: str) -> None:
    """Its command sets a weight between two steps. The units are counted at this weight."""
    ledger = started_ledger(url)
    ledger.append(RolloutWeightChanged(model="m", rollout="r", weight=25), actor="ann")
    acting, double = controller(ledger)
    acting.check_once()
    assert appended(ledger)[1:] == ["PolicyDecided", "RolloutWeightChanged"]
    assert [(one["step"], one["weight"]) for one in double.asked] == [(0, 25)]
    assert last(ledger, RolloutWeightChanged)["weight"] == 30


@pytest.mark.parametrize(
    ("weight", "step"), [(0.01, 0), (20, 0), (29.99, 0), (30, 1), (50, 2), (50.01, 2), (100, 2)]
)
def test_step_at_a_weight(weight: float, step: int) -> None:
    """It is the last step that is not above the weight."""
    assert step_at([20, 30, 50], weight) == step


@pytest.mark.parametrize(
    "end",
    [
        RolloutRolledBack(model="m", rollout="r", reason=""),
        RolloutPromoted(model="m", rollout="r", version=2),
    ],
)
def test_rollout_that_an_older_release_ends_is_forgotten(url: str, end: LedgerEvent) -> None:
    """Such a release appends no `PolicyEnded`. The end is found once."""
    ledger = started_ledger(url)
    acting, double = controller(ledger, EARLY)
    acting.check_once()
    ledger.append(end, actor="ann")
    acting.check_once()
    acting.check_once()
    assert double.forgotten.count("r") == 1


def test_running_rollout_is_registered_again_after_its_counts_were_lost(tmp_path: Path) -> None:
    """Otherwise the edges would count none of its units, and it would wait until its deadline."""
    ledger = started_ledger(f"sqlite:///{tmp_path}/ledger.db")
    store = EvidenceStore(ledger.engine)
    acting = Controller(ledger, store, refusal=permitted)

    def counted() -> dict[str, float]:
        with store._engine.connect() as connection:
            return {name: one.slow_ms for name, one in counted_rollouts(connection).items()}

    for _ in range(2):
        acting.check_once()
        assert counted() == {"r": float("inf")}
        store.forget("r")
    store.register("r", Counting(slow_ms=5))
    acting.check_once()
    assert counted() == {"r": 5}
