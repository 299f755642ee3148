"""Kills and cancellations at moments between a stage's job, its event and its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.errors import AccessDenied
from cluster.ledger.events import LedgerEvent, PipelineCancelled, StageFinished
from cluster.security.tokens.roles import Role
from cluster.storage import Layout
from jobs.pipeline.config import PipelineAction, PipelineConfig, PipelineSpec, StageConfig
from jobs.pipeline.control import Pipeline
from jobs.pipeline.keys import StageRefused
from jobs.pipeline.plan import Caller
from jobs.pipeline.run import Run
from jobs.pipeline.stage import outputs
from jobs.pipeline.stage.ray_jobs import PatientJobs
from jobs.ray_jobs import JobsUnavailable
from tests.samples.principals import who
from tests.unit.jobs.pipeline.conftest import World


class Killed(BaseException):
    """A double of kill -9 of the process that leads a run."""


GATE = """
import json, sys
value = float(sys.argv[1].partition("=")[2])
json.dump({"auc": value}, open("r.json", "w"))
"""


@pytest.fixture
def gated(world: World) -> World:
    """Return a world whose run r1 wrote an auc of 0.9, which a gate requires."""
    (world.root / "gate.py").write_text(GATE)
    world.run(gate(0.9)).execute(max_parallel=1)
    return world


def gate(value: float) -> PipelineSpec:
    return PipelineSpec(
        stages={
            "s": StageConfig(
                command="gate",
                parameters={"value": value},
                outputs={"result": "r.json"},
                require={"auc": 0.88},
            )
        }
    )


def text(world: World) -> str:
    return (world.root / "r.json").read_text()


def kill_after_job(world: World, *, run: str, value: float) -> None:
    """Let the leading process be killed when the job has ended, and before that is recorded."""

    def sleep(seconds: float) -> None:
        for process in world.jobs.processes.values():
            process.wait()
        raise Killed

    with pytest.raises(Killed):
        world.run(gate(value), run, sleep=sleep).execute(max_parallel=1)


def test_a_kill_before_the_event_does_not_make_a_failed_gate_pass(
    gated: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run judges what the stage wrote, and not the restored earlier file."""
    append = Run._append

    def killed(self: Run, event: LedgerEvent) -> Any:
        if isinstance(event, StageFinished):
            raise Killed
        return append(self, event)

    monkeypatch.setattr(Run, "_append", killed)
    with pytest.raises(Killed):
        gated.run(gate(0.7), "r2").execute(max_parallel=1)
    monkeypatch.setattr(Run, "_append", append)
    with pytest.raises(StageRefused, match=r"auc is 0\.7"):
        gated.run(gate(0.7), "r2").execute(max_parallel=1)
    assert gated.states("r2") == {"s": "unmet"}
    assert text(gated) == '{"auc": 0.9}'


def test_a_kill_after_the_event_restores_the_files_when_the_pipeline_runs_again(
    gated: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is left out of the next run, so only the event of the failed attempt says what to do."""

    def killed(paths: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "discard", killed)
        with pytest.raises(Killed):
            gated.run(gate(0.7), "r2").execute(max_parallel=1)
    assert text(gated) == '{"auc": 0.7}'
    run = gated.run(gate(0.7), "r3")
    run._settle_outputs()
    run._settle_outputs()
    assert text(gated) == '{"auc": 0.9}'


@pytest.mark.parametrize("is_complete", [True, False], ids=["cancelled", "killed while cancelling"])
def test_a_cancelled_run_without_a_leader_does_its_stage_again(gated: World, is_complete: bool) -> None:
    """The job had ended before the cancellation. Its result counts for nothing, and neither do the restored files."""
    kill_after_job(gated, run="r2", value=0.95)
    if is_complete:
        cancelling(gated).cancel()
        assert gated.states("r2") == {"s": "cancelled"}
        assert text(gated) == '{"auc": 0.9}'
    else:
        gated.ledger.append(PipelineCancelled(pipeline="p", run="r2", reason="late"), actor="bob")
    gated.run(gate(0.95), "r2").execute(max_parallel=1)
    assert gated.state("r2").stages["s"].job == "p-r2-s-2"
    assert text(gated) == '{"auc": 0.95}'


def test_a_stage_is_done_again_after_a_later_attempt_failed(gated: World) -> None:
    """The later attempt may have deployed something, so the earlier one proves nothing."""
    with pytest.raises(StageRefused):
        gated.run(gate(0.7), "r2").execute(max_parallel=1)
    gated.run(gate(0.9), "r3").execute(max_parallel=1)
    assert gated.state("r3").stages["s"].reused_from == ""
    assert gated.state("r3").stages["s"].job == "p-r3-s-1"


def cancelling(world: World, caller: Caller | None = None) -> Pipeline:
    record = SimpleNamespace(node_id=None, layout=world.places)
    config = PipelineConfig(action=PipelineAction.cancel, run="r2")
    return Pipeline(
        name="p",
        config=config,
        spec=gate(0.95),
        caller=caller or world.caller(),
        record=cast(Any, record),
        jobs=world.jobs,
    )


def test_only_the_starter_or_an_admin_cancels_a_run(gated: World) -> None:
    """Another person's run goes on."""
    kill_after_job(gated, run="r2", value=0.95)
    head = gated.ledger.head()
    alice = gated.caller()
    bob = replace(alice, actor=replace(alice.actor, principal=who(Role.data_engineer, subject="bob")))
    with pytest.raises(AccessDenied, match="Let an admin cancel it, or one of alice"):
        cancelling(gated, bob).cancel()
    assert gated.ledger.head() == head
    cancelling(gated).cancel()
    assert gated.state("r2").state == "cancelled"


def test_the_lock_does_not_follow_the_callers_options(gated: World) -> None:
    """`storage.local` names another folder, but the cluster has one lock."""
    pipeline = cancelling(gated, caller=replace(gated.caller(), places=Layout("/other")))
    assert pipeline.lock_file == Path(gated.places.pipelines) / "p" / "lock"


def test_calls_wait_while_rays_head_is_restarted(world: World) -> None:
    """A job whose submission succeeded, although the answer was lost, is not submitted twice."""
    (world.root / "gate.py").write_text(GATE)
    submit, faults = world.jobs.submit, [JobsUnavailable("down")] * 2

    def lost_answer(*arguments: Any, **options: Any) -> None:
        submit(*arguments, **options)
        raise JobsUnavailable("the answer was lost")

    def stop(job: str) -> None:
        if faults:
            raise faults.pop()

    world.jobs.submit, world.jobs.stop = lost_answer, stop  # type: ignore[method-assign]
    jobs = PatientJobs(world.jobs, sleep=lambda seconds: None)
    jobs.submit("j1", ["gate", "v=1"], result=Path("r"), metadata={})
    jobs.stop("j1")
    assert list(world.jobs.processes) == ["j1"]
    assert faults == []
    world.jobs.processes["j1"].wait()


def test_a_folder_with_files_of_others_is_not_replaced(world: World) -> None:
    """The files stay. An empty folder, and one that the stage itself wrote, are replaced."""
    (world.root / "report.py").write_text(
        "import os\nos.makedirs('reports')\nopen('reports/new.txt', 'w').write('1')\n"
    )
    spec = PipelineSpec(stages={"s": StageConfig(command="report", outputs={"o": "reports"}, always=True)})
    folder = world.root / "reports"
    folder.mkdir()
    (folder / "mine.txt").write_text("by hand")
    with pytest.raises(StageRefused, match=r"would replace the folder .*reports, whose files it never wrote"):
        world.run(spec).execute(max_parallel=1)
    assert (folder / "mine.txt").read_text() == "by hand"
    (folder / "mine.txt").unlink()
    world.run(spec).execute(max_parallel=1)
    world.run(spec, "r2").execute(max_parallel=1)
    assert [path.name for path in folder.iterdir()] == ["new.txt"]
