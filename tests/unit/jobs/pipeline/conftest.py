"""A pipeline of small scripts in a folder of its own, run by local processes in place of Ray jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.entrypoint import RESULT_VARIABLE
from cluster.ledger import Ledger
from cluster.ledger.events import LedgerEvent
from cluster.security.acting import Actor
from cluster.security.authorization.audit import DecisionRecorder
from cluster.security.authorization.policy import Policy
from cluster.security.keys.access import KeyAccess
from cluster.security.tokens.roles import Role
from cluster.security.tokens.source import TokenSource
from cluster.storage import ROOT_VARIABLE, Layout
from jobs.pipeline.config import PipelineSpec, StageConfig
from jobs.pipeline.context import RunContext
from jobs.pipeline.plan import Caller, Plan, make_plan
from jobs.pipeline.run import Run
from jobs.pipeline.stage.content import Platform
from jobs.pipeline.state import RunState, read_run
from jobs.ray_jobs import JobStatus
from tests.samples.principals import who

COPY = """
import json, os, sys, time
from factor import FACTOR
options = dict(argument.split("=", 1) for argument in sys.argv[1:])
with open("calls.log", "a") as log:
    log.write(options["name"] + "\\n")
total = sum(int(open(path).read()) for path in options["read"].split("+"))
if "wait" in options:
    print("waiting", flush=True)
    while not os.path.exists(options["wait"]):
        time.sleep(0.02)
with open(options["write"], "w") as file:
    file.write(str(total * FACTOR + int(options.get("add", "0"))))
json.dump({"total": total, "metrics": {"auc": float(options.get("auc", "0.9"))}}, open(os.environ["FALAJ_RESULT"], "w"))
if options.get("end") == "refused":
    print("refused: the rows are not good enough.")
    sys.exit(2)
sys.exit(int(options.get("end", "0")))
"""
"""A stage's script: it adds the numbers in files, multiplies them by `factor.FACTOR`, and writes the result."""


@dataclass
class LocalJobs:
    """Jobs as processes of this machine. They continue if the process that leads the run stops."""

    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)
    most: int = 0
    """The largest number of jobs that ran at the same time."""

    def submit(self, job: str, command: Sequence[str], *, result: Path, metadata: Mapping[str, str]) -> None:
        assert job not in self.processes, "Ray refuses a submission id that it knows."
        self.logs[job] = Path(f"{job}.log").absolute()
        with self.logs[job].open("wb") as log:
            self.processes[job] = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {RESULT_VARIABLE: str(result)},
            )
        self.most = max(self.most, sum(process.poll() is None for process in self.processes.values()))

    def status(self, job: str) -> JobStatus | None:
        if job not in self.processes:
            return None
        code = self.processes[job].poll()
        if code is None:
            return JobStatus(is_over=False)
        return JobStatus(is_over=True, exit_code=code if code >= 0 else None)

    def log(self, job: str) -> str:
        return self.logs[job].read_text()

    def stop(self, job: str) -> None:
        self.processes[job].send_signal(signal.SIGTERM)
        self.processes[job].wait()


def no_sleep(seconds: float) -> None:
    """Let the processes of jobs run for a moment."""
    os.sched_yield()


@dataclass
class World:
    """A folder with a pipeline's scripts and data, its ledger and its jobs."""

    root: Path
    ledger: Ledger
    jobs: LocalJobs = field(default_factory=LocalJobs)
    printed: list[str] = field(default_factory=list)

    @property
    def places(self) -> Layout:
        return Layout(str(self.root / ".falaj"))

    def caller(self, role: Role = Role.admin) -> Caller:
        principal = who(role, "employment_statistics")
        actor = Actor(
            principal=principal,
            access=KeyAccess(socket="", token=TokenSource(root="")),
            policy=Policy.load(),
            environment="local",
            decisions=DecisionRecorder(lambda event, actor: None),
        )
        return Caller(ledger=self.ledger, places=self.places, actor=actor, region="local")

    def plan(self, spec: PipelineSpec, role: Role = Role.admin) -> Plan:
        return make_plan(spec, self.caller(role))

    def run(
        self,
        spec: PipelineSpec,
        run: str = "r1",
        *,
        pipeline: str = "p",
        sleep: Callable[[float], None] = no_sleep,
    ) -> Run:
        plan = self.plan(spec)
        assert plan.faults == ()
        context = RunContext(
            ledger=self.ledger,
            actor="alice",
            platform=Platform(self.ledger, self.places),
            jobs=self.jobs,
            folder=self.root / ".falaj" / "pipelines" / pipeline,
            print_line=self.printed.append,
            sleep=sleep,
        )
        return Run(pipeline, run, plan, context)

    def state(self, run: str = "r1") -> RunState:
        state = read_run(self.ledger, "p", run)
        assert state is not None
        return state

    def states(self, run: str = "r1") -> dict[str, str]:
        return {name: stage.state.value for name, stage in self.state(run).stages.items()}

    def calls(self) -> list[str]:
        """Return the stages whose script ran, in order."""
        log = self.root / "calls.log"
        return log.read_text().split() if log.exists() else []

    def events(self, kind: type[LedgerEvent]) -> list[dict[str, Any]]:
        return [entry.payload for entry in self.ledger.entries(kind)]


def copy(name: str, read: str, write: str, **options: Any) -> StageConfig:
    """Return a stage that runs the script `copy_number`."""
    stage = {key: options.pop(key) for key in ("after", "require", "always", "enabled") if key in options}
    return StageConfig(
        command="copy_number",
        parameters={"name": name, "read": read, "write": "{outputs.number}", **options},
        inputs={str(number): path for number, path in enumerate(read.split("+"))},
        outputs={"number": write},
        **stage,
    )


def branches(**last: Any) -> PipelineSpec:
    """Return a pipeline with two branches: `left` and `right` after `first`, and `join` after both."""
    return PipelineSpec(
        stages={
            "first": copy("first", "source.txt", "first.txt"),
            "left": copy("left", "first.txt", "left.txt", add=1),
            "right": copy("right", "first.txt", "right.txt", add=2),
            "join": copy("join", "left.txt+right.txt", "join.txt", **last),
        }
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return a folder outside the checkout with a source, and the script that the stages run."""
    (tmp_path / "copy_number.py").write_text(COPY)
    (tmp_path / "factor.py").write_text("FACTOR = 2\n")
    (tmp_path / "source.txt").write_text("5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / ".falaj").mkdir()
    return World(tmp_path, Ledger(f"sqlite:///{tmp_path}/.falaj/ledger.db"))
