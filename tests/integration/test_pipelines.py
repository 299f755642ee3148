"""A pipeline in a user's own folder: planned, run as Ray jobs, stopped by a check, corrected, killed, and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import pyarrow.parquet as pq
import pytest

from cluster.ledger.events import PipelineFinished, StageFinished, StageStarted
from jobs.pipeline.state import newest_run, read_run
from jobs.ray_jobs import RayJobs
from tests.integration.conftest import refusal
from tests.integration.test_ray_jobs import ARITHMETIC, DEFINITIONS, job_details, people_and_income
from tests.servers.polling import wait_until

if TYPE_CHECKING:
    from cluster.ledger import Ledger
    from cluster.ledger.events.base import LedgerEvent
    from tests.integration.conftest import Project

CHECK = """
from dataclasses import dataclass

import pyarrow.parquet as pq

from cluster.entrypoint import job
from cluster.settings import PlatformConfig
from cluster.storage import resolve


@dataclass(kw_only=True, slots=True)
class CheckConfig(PlatformConfig):
    path: str = "???"
    column: str = "???"
    factor: float = 1.0


@job(None, CheckConfig)
def main(config: CheckConfig) -> dict[str, float]:
    values = pq.read_table(resolve(config.path))[config.column].to_pylist()
    return {"rows": len(values), "largest": config.factor * max(values)}


if __name__ == "__main__":
    main()
"""
PIPELINE = """
vars: {largest: 399}
stages:
  check:
    command: income_check
    parameters: {path: "{inputs.income}", column: amount, factor: 1.0}
    inputs: {income: income.parquet}
    require: {rows: ">0", largest: "<= ${pipeline.vars.largest}"}
  apply:
    command: feature_jobs.apply
    parameters: {definitions: declared}
  ingest:
    command: feature_jobs.ingest
    parameters: {definitions: declared, view: declared_income, num_buckets: 2}
    after: [check, apply]
  training_set:
    command: feature_jobs.training_set
    parameters: {service: declared, entities: people.parquet, output: declared.parquet}
    after: [ingest]
  materialize:
    command: feature_jobs.materialize
    parameters: {view: declared_income, as_of: "2026-01-01T00:00:00Z"}
    after: [ingest]
  train:
    command: jobs.train
    parameters: {name: declared, training_set: declared.parquet, label: y, model: lightgbm}
    require: {auc: 0.4}
"""
STAGES = ["check", "apply", "ingest", "training_set", "materialize", "train"]


@pytest.fixture(scope="module")
def workspace(falaj_cluster: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder outside the checkout with a pipeline, its definitions and a command of its own."""
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "declared.py").write_text(DEFINITIONS.replace("submitted", "declared"))
    (folder / "arithmetic.py").write_text(ARITHMETIC)
    (folder / "income_check.py").write_text(CHECK)
    (folder / "conf" / "pipeline").mkdir(parents=True)
    (folder / "conf" / "pipeline" / "loans.yaml").write_text(PIPELINE)
    people, income = people_and_income()
    pq.write_table(income, falaj_cluster.root / "income.parquet")
    pq.write_table(people, falaj_cluster.root / "people.parquet")
    return folder


def pipeline(project: Project, folder: Path, action: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--config-dir", str(folder / "conf"), "pipeline=loans", f"action={action}", *options)
    return project.run("jobs.pipeline", *arguments, cwd=folder)


def states(project: Project, name: str = "loans") -> dict[str, str]:
    """Return the states of the stages in the newest run of a pipeline."""
    ledger = project.ledger()
    run = read_run(ledger, name, str(newest_run(ledger, name)))
    assert run is not None
    return {name: stage.state.value for name, stage in run.stages.items()}


def own_events(ledger: Ledger, kind: type[LedgerEvent]) -> list[dict[str, Any]]:
    """Return the events of the pipeline `loans`. Other tests run other pipelines on the same cluster."""
    return [dict(entry.payload) for entry in ledger.entries(kind) if entry.payload["pipeline"] == "loans"]


def require_events(project: Project) -> None:
    """Require the events of a run that failed, was corrected and was resumed."""
    ledger = project.ledger()
    assert newest_run(ledger, "loans") == "first"
    assert [event["state"] for event in own_events(ledger, PipelineFinished)] == ["failed", "done"]
    attempts = [event["stage"] for event in own_events(ledger, StageStarted)]
    assert sorted(attempts) == sorted([*STAGES, "check"])  # the check ran again, because it had failed

    details = job_details(project, "loans-first-train-1")
    assert details["metadata"] == {"pipeline": "loans", "run": "first", "stage": "train"}
    results = {event["stage"]: event["result"] for event in own_events(ledger, StageFinished)}
    assert results["ingest"] == {"rows_in": 400, "rows_stored": 400, "rows_quarantined": 0}
    assert results["training_set"]["rows"] == 400
    assert results["train"]["version"] == 1


def test_a_users_own_pipeline_is_planned_stopped_corrected_killed_and_resumed(
    falaj_cluster: Project, workspace: Path
) -> None:
    """The check fails for the stated reason, and no later stage has run. The corrected run continues.

    The process that leads the run is killed while a stage runs, and a new one continues with its job. Then nothing is
    left to do.
    """
    wrong = pipeline(falaj_cluster, workspace, "plan", "pipeline.stages.ingest.parameters.view=incme")
    assert "Stage 'ingest': unknown view 'incme'" in refusal(wrong)
    planned = pipeline(falaj_cluster, workspace, "plan")
    assert planned.returncode == 0, planned.stderr
    assert "6 stages, no faults" in planned.stdout

    stopped = pipeline(falaj_cluster, workspace, "run", "run=first", "pipeline.vars.largest=10")
    assert "Stage 'check' does not meet a requirement: largest is 399, but must be <= 10." in refusal(stopped)
    assert states(falaj_cluster)["ingest"] == "waiting"

    command = [
        sys.executable, "-m", "jobs.pipeline", "--config-dir", str(workspace / "conf"), "pipeline=loans",
    ]  # fmt: skip
    leader = subprocess.Popen(command, cwd=workspace, env=falaj_cluster.env, stdout=subprocess.DEVNULL)
    wait_until(lambda: states(falaj_cluster)["ingest"] == "running", seconds=90)
    jobs = [event["job"] for event in own_events(falaj_cluster.ledger(), StageStarted)]
    wait_until(lambda: RayJobs(falaj_cluster.record).status(jobs[-1]) is not None, seconds=90)
    os.kill(leader.pid, signal.SIGKILL)
    leader.wait()

    resumed = pipeline(falaj_cluster, workspace, "run")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert states(falaj_cluster) == dict.fromkeys(STAGES, "done")
    require_events(falaj_cluster)

    ledger = falaj_cluster.ledger()
    events = ledger.head()
    again = pipeline(falaj_cluster, workspace, "run")
    assert "nothing to do, all 6 stages are done" in again.stdout
    assert ledger.head() == events

    page = workspace / "page.html"
    shown = pipeline(falaj_cluster, workspace, "show", f"output={page}")
    assert "pipeline loans, run first: done" in shown.stdout
    assert "✔ train" in shown.stdout
    assert "loans" in page.read_text()


def test_a_run_is_cancelled_from_another_process(falaj_cluster: Project, workspace: Path) -> None:
    """Its job ends, and the run can go on later under its id."""
    (workspace / "conf" / "pipeline" / "slow.yaml").write_text(
        "stages: {wait: {command: slow_stage, outputs: {file: slow.txt}}}"
    )
    (workspace / "slow_stage.py").write_text("import time\ntime.sleep(600)\n")
    options = ("--config-dir", str(workspace / "conf"), "pipeline=slow")
    leader = subprocess.Popen(
        [sys.executable, "-m", "jobs.pipeline", *options], cwd=workspace, env=falaj_cluster.env
    )
    ledger = falaj_cluster.ledger()

    def job() -> str | None:
        started = [
            entry.payload for entry in ledger.entries(StageStarted) if entry.payload["pipeline"] == "slow"
        ]
        return str(started[0]["job"]) if started else None

    def is_running() -> bool:
        try:
            return job_details(falaj_cluster, str(job()))["status"] == "RUNNING"
        except HTTPError:  # the event precedes the job
            return False

    wait_until(is_running, seconds=90)
    cancelled = falaj_cluster.run("jobs.pipeline", *options, "action=cancel", cwd=workspace)
    assert cancelled.returncode == 0, cancelled.stderr
    assert leader.wait(60) == 2
    assert job_details(falaj_cluster, str(job()))["status"] == "STOPPED"
    [finished] = [event for event in ledger.entries(PipelineFinished) if event.payload["pipeline"] == "slow"]
    assert finished.payload["state"] == "cancelled"
