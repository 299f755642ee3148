"""Tests of the command `jobs.schedule` with several callers: only its owner or an admin controls a schedule."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ledger import Ledger
from cluster.ledger.events import AccessDecided, ScheduleApplied, ScheduledRunDue
from cluster.security.acting import Actor
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Policy
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.roles import Role
from jobs.schedule import __main__ as command
from jobs.schedule import schedules

NIGHTLY = "cron: 30 2 * * *\ncommand: feature_jobs.apply\nparameters: {plan: true}\n"
APPLY = ("action=apply", "schedule=nightly", "--config-dir", "conf")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path}/ledger.db")


@pytest.fixture
def call(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs the command as a caller, and returns its exit code."""
    folder = tmp_path / "conf" / "schedule"
    folder.mkdir(parents=True)
    (folder / "nightly.yaml").write_text(NIGHTLY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FALAJ_PROJECT_ROOT", str(tmp_path))
    monkeypatch.setattr(command, "require_running_cluster", lambda config: None)
    monkeypatch.setattr(command, "open_ledger", lambda config: ledger)

    def run(*arguments: str, subject: str = "alice", role: Role = Role.data_engineer) -> int:
        def actor(*_: Any, **__: Any) -> Actor:
            principal = Principal(
                subject=subject, role=role, purpose="", tenant="default", models=None, expires_at=0
            )
            return Actor(
                principal=principal,
                access=SimpleNamespace(),  # type: ignore[arg-type]
                policy=Policy.load(region="local"),
                environment="production",
                decisions=DecisionRecorder(ledger.append),
            )

        monkeypatch.setattr(command, "create_actor", actor)
        monkeypatch.setattr(sys, "argv", ["schedule", *arguments])
        try:
            command.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


def test_only_owner_and_admin_control_a_schedule(
    call: Callable[..., int], ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another caller gets one line and an event, and changes nothing. An admin may take it over."""
    assert call(*APPLY) == 0
    for arguments in (
        APPLY,
        *((f"action={action}", "name=nightly") for action in ("trigger", "pause", "remove")),
    ):
        assert call(*arguments, subject="bob") == 2, arguments
        assert "schedule-of-another" in capsys.readouterr().err
    schedule = schedules.require(ledger, "nightly")
    assert (schedule.state, schedule.principal["subject"]) == ("active", "alice")
    assert list(ledger.entries(ScheduledRunDue)) == []
    assert sum(not entry.payload["allowed"] for entry in ledger.entries(AccessDecided)) == 4

    assert call("action=pause", "name=nightly") == 0
    assert call("action=pause", "name=nightly") == 2
    assert "is paused already" in capsys.readouterr().err
    assert call(*APPLY) == 0
    assert "is paused already, with this definition" in capsys.readouterr().out
    assert call("action=resume", "name=nightly", subject="root", role=Role.admin) == 0
    assert call("action=trigger", "name=nightly") == 0
    assert call(*APPLY, subject="root", role=Role.admin) == 0
    assert schedules.require(ledger, "nightly").principal["subject"] == "root"
    assert call("action=remove", "name=nightly") == 2
    assert call("action=remove", "name=nightly", subject="root", role=Role.admin) == 0
    assert call(*APPLY, subject="bob") == 0
    assert schedules.require(ledger, "nightly").principal["subject"] == "bob"
    assert call("action=remove", "name=nightli", subject="bob") == 2
    assert "Did you mean 'nightly'" in capsys.readouterr().err


def test_unreadable_schedule_is_applied_again_or_removed(call: Callable[..., int], ledger: Ledger) -> None:
    """Its definition is one of another release. Only its owner may do this, too."""
    assert call(*APPLY) == 0
    definition = schedules.require(ledger, "nightly").spec
    for repair in (APPLY, ("action=remove", "name=nightly")):
        applied = ScheduleApplied(
            schedule="nightly",
            definition=schedules.definition_of(definition) | {"missed": "run_all"},
            folder="/",
            config_dir=None,
            principal={"subject": "alice"},
        )
        ledger.append(applied, actor="t")
        assert call("action=pause", "name=nightly") == 2
        assert call(*repair, subject="bob") == 2
        assert call(*repair) == 0
    assert schedules.names(ledger) == []


def test_unusable_folder_is_refused(
    call: Callable[..., int], ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another user of the machine could put code or configurations there. Nothing is stored."""
    (tmp_path / "conf").chmod(0o777)
    assert call(*APPLY) == 2
    assert "conf can be changed by others" in capsys.readouterr().err
    assert list(ledger.entries(ScheduleApplied)) == []
