"""A replay computes each decision again from the recorded counts, and names the first that differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger import Ledger
from cluster.ledger.chain import GENESIS, Entry, build_entry
from cluster.ledger.events import PolicyPaused, PolicyResumed
from cluster.statistics.evidence import Evidence
from serve_apps.rollout.controller.controller import Controller
from serve_apps.rollout.json_form import as_json
from serve_apps.rollout.replay import main, replayed_lines
from tests.processes.commands import run_main
from tests.samples.policies import EARLY, FAILING, HEALTHY, EvidenceDouble, permitted, started_ledger
from tests.samples.watches import promoted_ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a ledger with a rollout that waits, takes a step, and is rolled back."""
    opened = started_ledger(f"sqlite:///{tmp_path}/ledger.db")
    double = EvidenceDouble()
    acting = Controller(opened, double, refusal=permitted)
    for counts in (EARLY, HEALTHY, FAILING):
        double.counts = counts
        acting.check_once()
    return opened


Change = Callable[[Entry], Entry | None]


@pytest.fixture
def promoted(tmp_path: Path) -> Ledger:
    """Return a ledger with a rollout that is paused and resumed, takes all steps, and is promoted."""
    opened = started_ledger(f"sqlite:///{tmp_path}/promoted.db")
    acting = Controller(opened, EvidenceDouble(HEALTHY), refusal=permitted)
    opened.append(PolicyPaused(model="m", rollout="r", reason=""), actor="ann")
    acting.check_once()
    opened.append(PolicyResumed(model="m", rollout="r", reason=""), actor="ann")
    for _ in range(3):
        acting.check_once()
    return opened


def export(ledger: Ledger, path: Path, change: Change = lambda entry: entry) -> Path:
    """Write an export with a valid hash chain, in which some events are changed or left out."""
    previous, lines = GENESIS, []
    for number, entry in enumerate(filter(None, map(change, ledger.entries())), start=1):
        built = build_entry(
            seq=number,
            time=entry.time,
            type=entry.type,
            actor=entry.actor,
            payload=entry.payload,
            prev_hash=previous,
        )
        previous = built.hash
        lines.append(built.line() + "\n")
    path.write_text("".join(lines))
    return path


def test_recorded_decisions_are_computed_again(ledger: Ledger, tmp_path: Path) -> None:
    """It prints a line for each, and needs neither a cluster nor the ledger."""
    result = run_main(main, "--file", str(export(ledger, tmp_path / "export.jsonl")))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "5 m r: plan of 3 steps",
        "6 m r: continue",
        "7 m r: continue",
        "9 m r: roll_back",
        "3 decisions of 1 rollouts are as recorded",
    ]


def in_event(seq: int, **changes: Any) -> Callable[[Entry], Entry]:
    """Return a change of one event's payload."""
    return lambda entry: replace(entry, payload=entry.payload | changes) if entry.seq == seq else entry


def by(actor: str, seq: int) -> Callable[[Entry], Entry]:
    """Return a change of one event's actor."""
    return lambda entry: replace(entry, actor=actor) if entry.seq == seq else entry


def without(*seqs: int) -> Change:
    """Return a change that leaves events out."""
    return lambda entry: None if entry.seq in seqs else entry


def counts(evidence: Evidence, **changes: Any) -> dict[str, Any]:
    return dict(as_json(replace(evidence, **changes)))


def traffic(units_per_hour: float) -> dict[str, Any]:
    return {"units_per_hour": units_per_hour, "events": {"failure": 0.01}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_event(7, verdict="promote"), "Event 7 (PolicyDecided) differs: its verdict is 'promote'"),
        (
            in_event(6, missing=["units: 6 of 277", "no_harm: failure at most 44.985%, limit 5.000%"]),
            "Event 6 (PolicyDecided) differs: its figure of 'units' is '6', but its counts give '5'",
        ),
        (in_event(6, missing=[]), "Event 6 (PolicyDecided) differs: its missing is []"),
        (in_event(9, reasons=["breaker: no"]), "Event 9 (PolicyDecided) differs: its reasons is ['breaker']"),
        (in_event(7, evidence=counts(FAILING)), "but its counts give 'roll_back'"),
        (in_event(8, weight=50), "Event 8 (RolloutWeightChanged) differs: its weight is 50"),
        (in_event(7, not_done="paused"), "Event 7 (PolicyDecided) differs: its not_done is 'paused'"),
        (in_event(7, not_done="ann may not"), "Event 8 (RolloutWeightChanged) differs: its change is"),
        (
            by("eve", 7),
            "Event 7 (PolicyDecided) differs: its actor is 'eve', but it must be 'system:rollouts'",
        ),
        (in_event(9, evidence=counts(FAILING)), "its step is 0, but the weight 30 gives 1"),
        (without(10), "Event 9 (PolicyDecided) differs: its change is 'missing'"),
        (without(10, 11), "its change is 'missing', but its counts give 'RolloutRolledBack'"),
        (by("eve", 10), "Event 9 (PolicyDecided) differs: its change is 'missing'"),
        (in_event(10, rollout="q"), "Event 10 (RolloutRolledBack) differs: its rollout is 'q'"),
        (in_event(9, evidence={}), "Event 9 (PolicyDecided) cannot be computed again"),
        (
            in_event(5, traffic=traffic(10_000)),
            "Event 5 (PolicyStarted) differs: its plan.steps.0.duration_s",
        ),
        (in_event(5, traffic=traffic(10)), "Event 5 (PolicyStarted) differs: its policy has no plan"),
    ],
)
def test_first_difference_is_named(ledger: Ledger, tmp_path: Path, change: Change, message: str) -> None:
    """Also if the hash chain is valid, so somebody computed it again."""
    result = run_main(main, "--file", str(export(ledger, tmp_path / "export.jsonl", change)))
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            in_event(7, not_done=""),
            "Event 7 (PolicyDecided) differs: its not_done is '', but it must be 'paused'",
        ),
        (without(6), "Event 6 (PolicyDecided) differs: its not_done is 'paused', but it must be ''"),
        (in_event(5, version=1), "Event 5 (PolicyStarted) differs: its version is 1, but it must be 2"),
        (in_event(14, version=1), "Event 14 (AliasMoved) differs: its version is 1, but it must be 2"),
        (in_event(14, alias="x"), "Event 14 (AliasMoved) differs: its alias is 'x'"),
        (without(14), "Event 14 (RolloutPromoted) differs: its change is 'RolloutPromoted'"),
        (in_event(15, version=1), "Event 15 (RolloutPromoted) differs: its version is 1, but it must be 2"),
    ],
)
def test_wrong_promotion_or_pause_is_named(
    promoted: Ledger, tmp_path: Path, change: Change, message: str
) -> None:
    """The export without a change is as recorded."""
    result = run_main(main, "--file", str(export(promoted, tmp_path / "export.jsonl")))
    assert result.returncode == 0, result.stderr
    result = run_main(main, "--file", str(export(promoted, tmp_path / "export.jsonl", change)))
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr


def test_count_that_the_access_files_do_not_give_is_named(ledger: Ledger, tmp_path: Path) -> None:
    """Here the counts are those of a double, and the files have no unit of the rollout."""
    (tmp_path / "access").mkdir()
    (tmp_path / "access" / "20270115T080000-a.jsonl").touch()
    words = ("--file", str(export(ledger, tmp_path / "export.jsonl")), "--logs", str(tmp_path / "access"))
    result = run_main(main, *words)
    message = "Event 6 (PolicyDecided) differs: its watched_units is 5, but the access files give 0."
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr


def test_changed_event_without_a_new_hash_is_named(ledger: Ledger, tmp_path: Path) -> None:
    """The replay verifies the chain first."""
    path = export(ledger, tmp_path / "export.jsonl")
    path.write_text(path.read_text().replace('"verdict":"roll_back"', '"verdict":"promote"'))
    result = run_main(main, "--file", str(path))
    assert (result.returncode, "Event 9 was changed" in result.stderr) == (2, True), result.stderr


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """In one line."""
    result = run_main(main, "--file", str(tmp_path / "none.jsonl"))
    assert (result.returncode, "cannot be read" in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("WatchDecided", {"verdict": "continue"}, "its verdict is 'continue'"),
        ("WatchDecided", {"evidence": as_json(HEALTHY)}, "but its counts give 'continue'"),
        ("RolloutRolledBack", {"rollout": "other"}, "its rollout is 'other'"),
        ("AliasMoved", {"version": 2}, "its version is 2"),
    ],
)
def test_changed_decision_after_a_promotion_is_named(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    """The rollback of a promotion is computed again, too, and it must name the predecessor."""
    ledger, acting, _ = promoted_ledger(f"sqlite:///{tmp_path}/ledger.db", holdback=True, counts=FAILING)
    acting.check_once()
    seq = max(entry.seq for entry in ledger.entries() if entry.type == kind)
    assert list(replayed_lines(ledger.entries()))
    changed = export(ledger, tmp_path / "export.jsonl", in_event(seq, **changes))
    result = run_main(main, "--file", str(changed))
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr
