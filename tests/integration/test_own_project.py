"""A project that `cluster.new_project` wrote, outside the checkout: a second pipeline, its schedules, and drift."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.ledger.events import ModelMonitored, PipelineFinished, ScheduledRunDue, ScheduledRunFinished
from tests.integration.client import Client
from tests.integration.conftest import refusal
from tests.integration.test_pipelines import states
from tests.servers.polling import wait_until

if TYPE_CHECKING:
    from tests.integration.conftest import Project

OWN = """
# The skeleton's pipeline, with one more check before the ingestion.
defaults: [machines, _self_]
vars:
  rows: {folder}/data/readings.parquet
  entities: {folder}/data/failures.parquet
  build: {folder}/build
stages:
  fleet:
    command: data_check
    parameters: ${{pipeline.stages.check.parameters}}
    inputs: ${{pipeline.stages.check.inputs}}
    require: {{entities: ">={least}"}}
  ingest:
    after: [check, fleet, apply]
"""
STAGES = {
    "check", "fleet", "apply", "ingest", "training_set", "materialize", "train", "evaluate", "deploy",
}  # fmt: skip
EVERY_FIVE_SECONDS = """
cron: "* * * * * */5"
command: jobs.pipeline
parameters: {pipeline: own}
overlap: skip
"""
MONITOR = """
trigger: {{kind: outcomes, of: failure, count: 100000}}
command: jobs.monitor
parameters: {{name: failure, reference: {folder}/build/train.parquet, label: failed, period: month}}
"""
AFTER_DRIFT = """
trigger: {{kind: drift, of: failure}}
command: note
parameters: {{path: {folder}/note.txt}}
"""
NOTE = """
from dataclasses import dataclass
from pathlib import Path

from cluster.entrypoint import job
from cluster.settings import PlatformConfig


@dataclass(kw_only=True, slots=True)
class NoteConfig(PlatformConfig):
    path: str = "???"


@job(None, NoteConfig)
def main(config: NoteConfig) -> None:
    Path(config.path).write_text("the model has drifted")


if __name__ == "__main__":
    main()
"""
MACHINES = 400
WAIT_S = 120.0
PREDICT = "/v1/models/failure:predict"


@pytest.fixture(scope="module")
def folder(falaj_cluster: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a new project, with a pipeline that extends the skeleton's, and a command of its own."""
    folder = tmp_path_factory.mktemp("own") / "machines"
    falaj_cluster.run("cluster.new_project", str(folder), check=True)
    (folder / "note.py").write_text(NOTE)
    for name, content in {"every": EVERY_FIVE_SECONDS, "watch": MONITOR, "after_drift": AFTER_DRIFT}.items():
        text = content if name == "every" else content.format(folder=folder)
        (folder / "conf" / "schedule" / f"{name}.yaml").write_text(text)
    return folder


def run(project: Project, folder: Path, module: str, *options: str) -> Any:
    return project.run(module, "--config-dir", "conf", *options, cwd=folder)


def write_pipeline(folder: Path, *, least: int) -> None:
    """Write the pipeline `own`. Its inserted check wants at least this number of machines."""
    text = OWN.format(folder=folder, least=least)
    (folder / "conf" / "pipeline" / "own.yaml").write_text(text)


def finished(project: Project, schedule: str) -> list[dict[str, Any]]:
    """Return the ends of the runs of a schedule."""
    return [entry.payload for entry in project.ledger().find(ScheduledRunFinished, schedule=schedule)]


def monitor(project: Project) -> dict[str, Any]:
    """Let the schedule `watch` monitor the model once, and return the event of the monitoring."""
    number = len(finished(project, "watch"))
    project.run("jobs.schedule", "action=trigger", "name=watch", check=True)
    wait_until(lambda: len(finished(project, "watch")) > number, "monitored", seconds=WAIT_S)
    last = finished(project, "watch")[-1]
    assert last["state"] == "done", last
    *_, event = project.ledger().entries(ModelMonitored)
    return event.payload


def test_a_project_is_stopped_corrected_scheduled_and_reacts_to_drift(
    falaj_cluster: Project, folder: Path
) -> None:
    """An inserted check stops the pipeline. The corrected run goes on to its end, and a schedule runs the pipeline.

    The drift trigger starts a command of the user's own after a monitoring run that finds drift, and not before.
    """
    stop_and_resume(falaj_cluster, folder)
    for schedule in ("every", "watch", "after_drift"):
        applied = run(falaj_cluster, folder, "jobs.schedule", "action=apply", f"schedule={schedule}")
        assert applied.returncode == 0, applied.stderr
    wait_until(lambda: bool(finished(falaj_cluster, "every")), "a scheduled run", seconds=WAIT_S)
    assert finished(falaj_cluster, "every")[0]["state"] == "done"
    falaj_cluster.run("jobs.schedule", "action=remove", "name=every", check=True)
    require_reaction_to_drift(falaj_cluster, folder)
    for schedule in ("watch", "after_drift"):
        falaj_cluster.run("jobs.schedule", "action=remove", f"name={schedule}", check=True)


def stop_and_resume(project: Project, folder: Path) -> None:
    """Let the inserted check fail, and correct the file. No later stage has run, and the same run goes on."""
    write_pipeline(folder, least=500)
    planned = run(project, folder, "jobs.pipeline", "pipeline=own", "action=plan")
    assert "9 stages, no faults" in planned.stdout, planned.stderr
    stopped = run(project, folder, "jobs.pipeline", "pipeline=own", "run=own-1")
    assert "'fleet' does not meet a requirement: entities is 400, but must be >= 500" in refusal(stopped)
    assert states(project, "own")["ingest"] == "waiting"

    write_pipeline(folder, least=400)
    resumed = run(project, folder, "jobs.pipeline", "pipeline=own")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert states(project, "own") == dict.fromkeys(STAGES, "done")
    ends = [entry.payload for entry in project.ledger().entries(PipelineFinished)]
    own = [(end["run"], end["state"]) for end in ends if end["pipeline"] == "own"]
    assert own == [("own-1", "failed"), ("own-1", "done")]


def require_reaction_to_drift(project: Project, folder: Path) -> None:
    """Send usual requests, then unusual ones. Only the monitoring after the unusual ones starts the command."""
    client = Client(project)
    body = {"entities": [{"machine_id": number} for number in range(MACHINES)]}
    assert client.call(PREDICT, body)[0] == 200
    assert not monitor(project)["drift"]
    assert not list(project.ledger().find(ScheduledRunDue, schedule="after_drift"))

    hot = body | {"features": {"readings__heat": 70.0, "readings__vibration": 9.0}}
    assert client.call(PREDICT, hot)[0] == 200
    assert {"readings__heat", "readings__vibration"} <= monitor(project)["drift"].keys()
    wait_until(lambda: bool(finished(project, "after_drift")), "the drift trigger", seconds=WAIT_S)
    assert finished(project, "after_drift")[0]["state"] == "done"
    assert (folder / "note.txt").read_text() == "the model has drifted"
    [due] = project.ledger().find(ScheduledRunDue, schedule="after_drift")
    assert due.payload["reason"].startswith("drift of model failure: ")
    assert "readings__heat" in due.payload["reason"]
