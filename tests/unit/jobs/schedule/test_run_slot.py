"""Tests of a slot's process: it checks the right of the schedule's principal and the folders before it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import (
    AccessDecided,
    ScheduleApplied,
    ScheduledRunDue,
    ScheduledRunFinished,
    ScheduledRunStarted,
)
from jobs.child_process import Ended
from jobs.schedule import run_slot, schedules
from jobs.schedule.config import ScheduleSpec
from tests.unit.jobs.submission.conftest import record

SLOT = "2026-11-30T02:30:00+00:00"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


@pytest.fixture
def run(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that applies a schedule with a role, runs a slot, and returns the process's exit code. The
    command is a double: it only ends."""
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(run_slot, "require_recorded_cluster", lambda config: record(tmp_path))
    monkeypatch.setattr(run_slot, "open_ledger", lambda config: ledger)
    done = Ended(exit_code=0, state="done", seconds=0.0, reason="", was_stopped=False)
    monkeypatch.setattr(run_slot, "execute", lambda *_, **__: done)
    monkeypatch.setattr(run_slot, "principals_token", lambda *_: run_slot.nullcontext({}))
    monkeypatch.setenv("FALAJ_PROJECT_ROOT", str(tmp_path))

    def run_role(role: str, **principal: Any) -> int:
        applied = ScheduleApplied(
            schedule="nightly",
            definition=schedules.definition_of(ScheduleSpec(cron="30 2 * * *")),
            folder=str(tmp_path / "project"),
            config_dir=None,
            principal={"subject": "alice", "role": role, "purpose": "", "tenant": "default", **principal},
        )
        ledger.append(applied, actor="alice")
        ledger.append(ScheduledRunDue(schedule="nightly", slot=SLOT, reason="cron"), actor="t")
        monkeypatch.setattr(sys, "argv", ["run_slot", "name=nightly", f"slot='{SLOT}'"])
        try:
            run_slot.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run_role


def finished(ledger: Ledger) -> list[tuple[str, str]]:
    """Return state and reason of each end."""
    return [(e.payload["state"], e.payload["reason"]) for e in ledger.entries(ScheduledRunFinished)]


def test_principal_with_the_right_runs(run: Callable[..., int], ledger: Ledger) -> None:
    """A second process of the slot does nothing."""
    assert [run("data_engineer"), run("data_engineer")] == [0, 0]
    assert finished(ledger) == [("done", "")]
    assert len(list(ledger.entries(ScheduledRunStarted))) == 1


@pytest.mark.parametrize("principal", [{"role": "service"}, {"role": "data_engineer", "tenant": "other"}])
def test_principal_that_lost_the_right_does_not_run(
    run: Callable[..., int], ledger: Ledger, capsys: pytest.CaptureFixture[str], principal: dict[str, str]
) -> None:
    """The policies or the environment have changed since the schedule was applied. The slot's end has the reason, and
    the denial is an event. The next slot can run, so a slot that was denied is finished."""
    assert run(**principal) == 2
    [(state, reason)] = finished(ledger)
    assert (state, "schedule runs on schedule 'nightly'" in reason) == ("not started", True)
    assert "schedule runs" in capsys.readouterr().err
    assert not list(ledger.entries(ScheduledRunStarted))
    [denied] = ledger.entries(AccessDecided)
    assert (denied.payload["allowed"], denied.payload["action"]) == (False, "schedule_runs")
    assert schedules.unfinished(ledger, "nightly") == []


def test_folder_that_became_writable_for_others_ends_the_slot(
    run: Callable[..., int], ledger: Ledger, tmp_path: Path
) -> None:
    """The reason names the folder."""
    (tmp_path / "project").chmod(0o777)
    assert run("data_engineer") == 2
    [(state, reason)] = finished(ledger)
    assert (state, "project can be changed by others" in reason) == ("not started", True)
    assert not list(ledger.entries(ScheduledRunStarted))


def test_denied_process_does_not_end_the_run_of_another(run: Callable[..., int], ledger: Ledger) -> None:
    """The first process has started. A second one, without the right, records no end."""
    started = ScheduledRunStarted(schedule="nightly", slot=SLOT, job="first")
    ledger.append(started, actor="t")
    assert run("service") == 0
    assert finished(ledger) == []
