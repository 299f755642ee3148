"""Schedules on a cluster: real jobs, a killed scheduler, failures with a reason, and the rights of the principal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.ledger.events import ScheduledRunFinished, ScheduledRunStarted
from cluster.node.parts import Part, find_parts
from jobs.schedule import schedules
from tests.integration.conftest import refusal
from tests.servers.polling import wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import Project

WRITE_CALLER = """
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.errors import RefusedError
from cluster.ledger import open_ledger
from cluster.security.acting import create_actor
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig


@dataclass(kw_only=True, slots=True)
class WriteCallerConfig(PlatformConfig):
    path: str = "???"
    refuse: bool = False


@job(None, WriteCallerConfig)
def main(config: WriteCallerConfig) -> None:
    actor = create_actor(config, require_running_cluster(config), open_ledger(config), entrypoint="write_caller")
    with open(config.path, "a") as file:
        file.write(f"{actor.name} {actor.principal.role.value}\\n")
    if config.refuse:
        raise RefusedError("the command says no")


if __name__ == "__main__":
    main()
"""
# A slot that is due during a run is left out. Otherwise slots would wait on a slow machine.
EVERY_FIVE_SECONDS = """
cron: "* * * * * */5"
overlap: skip
command: write_caller
parameters: {{path: {path}, refuse: {refuse}}}
"""


def test_schedule_runs_survives_a_kill_and_names_failures(falaj_cluster: Project) -> None:
    """Slots run as jobs with the rights of the caller, and go on after `kill -9` of the scheduler."""
    project, callers = falaj_cluster, falaj_cluster.root / "callers.txt"
    (project.root / "write_caller.py").write_text(WRITE_CALLER)
    conf = project.root / "conf" / "schedule"
    conf.mkdir(parents=True)
    (conf / "ticks.yaml").write_text(EVERY_FIVE_SECONDS.format(path=callers, refuse="false"))
    options = ("action=apply", "schedule=ticks", "identity.role=data_engineer")
    applied = project.run("jobs.schedule", "--config-dir", "conf", *options)
    assert "role data_engineer" in applied.stdout, applied.stderr
    assert "already" in project.run("jobs.schedule", "--config-dir", "conf", *options, check=True).stdout
    _wait(lambda: len(_finished(project)) >= 1)
    scheduler = find_parts(project.record)[Part.scheduler]
    os.kill(scheduler.pid, signal.SIGKILL)
    count = len(_finished(project))
    _wait(lambda: len(_finished(project)) >= count + 2)
    assert {run["state"] for run in _finished(project)} == {"done"}
    assert {line.split()[1] for line in callers.read_text().splitlines()} == {"data_engineer"}
    started = [entry.payload["slot"] for entry in project.ledger().entries(ScheduledRunStarted)]
    assert len(started) == len(set(started))

    (conf / "ticks.yaml").write_text(EVERY_FIVE_SECONDS.format(path=callers, refuse="true"))
    project.run("jobs.schedule", "--config-dir", "conf", *options, check=True)
    _wait(lambda: _finished(project)[-1]["state"] == "refused")
    assert _finished(project)[-1]["reason"] == "the command says no"
    project.run("jobs.schedule", "action=pause", "name=ticks", check=True)
    assert "last run" in project.run("jobs.schedule", check=True).stdout
    _wait(lambda: not schedules.unfinished(project.ledger(), "ticks"))
    triggered = project.run("jobs.schedule", "action=trigger", "name=ticks", check=True)
    slot = triggered.stdout.split()[1]
    _wait(lambda: slot in [run["slot"] for run in _finished(project)])
    project.run("jobs.schedule", "action=remove", "name=ticks", check=True)
    assert "no schedule is applied" in project.run("jobs.schedule", check=True).stdout


def test_wrong_schedules_are_refused_in_one_line(falaj_cluster: Project) -> None:
    """A wrong calendar, command, option, name or role is refused before anything is stored."""
    project = falaj_cluster
    folder = project.root / "wrong" / "schedule"
    folder.mkdir(parents=True)
    contents = {
        "calendar": "cron: 61 * * * *\ncommand: jobs.monitor\n",
        "zone": "cron: 1 * * * *\ntime_zone: Asia/Dubay\ncommand: jobs.monitor\n",
        "module": "cron: 1 * * * *\ncommand: jobs.moniter\n",
        "option": "cron: 1 * * * *\ncommand: jobs.monitor\nparameters: {nam: x}\n",
        "both": "command: jobs.monitor\n",
    }
    named = {
        "calendar": "61",
        "zone": "Asia/Dubay",
        "module": "jobs.moniter",
        "option": "nam",
        "both": "cron",
    }
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(content)
        result = project.run("jobs.schedule", "--config-dir", "wrong", "action=apply", f"schedule={name}")
        assert named[name] in refusal(result)
    (folder / "right.yaml").write_text("cron: 1 1 1 1 *\ncommand: feature_jobs.apply\n")
    right = ("--config-dir", "wrong", "action=apply", "schedule=right")
    assert "auditor" in refusal(project.run("jobs.schedule", *right, "identity.role=auditor"))
    misspelt = project.run("jobs.schedule", "--config-dir", "wrong", "action=apply", "schedule=rigth")
    assert "no choice 'rigth'. Did you mean 'right'?" in refusal(misspelt)
    assert "no_such" in refusal(project.run("jobs.schedule", "action=pause", "name=no_such"))


def _finished(project: Project) -> list[dict[str, Any]]:
    return [dict(entry.payload) for entry in project.ledger().entries(ScheduledRunFinished)]


def _wait(is_reached: Callable[[], bool]) -> None:
    wait_until(is_reached, "the state of the schedule", seconds=300)
