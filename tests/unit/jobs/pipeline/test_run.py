"""Runs of a pipeline: which stages run, which do not run again, what remains after a kill, and when a run stops."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ledger.events import (
    PipelineCancelled,
    PipelineFinished,
    PipelineStarted,
    StageFinished,
    StageStarted,
)
from jobs.pipeline.census.earlier_state import EARLIER_RUN, adopt_earlier_state
from jobs.pipeline.config import PipelineSpec
from jobs.pipeline.context import EarlierStage, RunCancelled, StageFailed
from jobs.pipeline.keys import StageRefused
from tests.unit.jobs.pipeline.conftest import World, branches, copy

STAGES = ["first", "left", "right", "join"]


class Killed(BaseException):
    """A double of kill -9 of the process that leads a run. No `except Exception` catches it."""


def kill_at(world: World, is_time: Callable[[], bool]) -> Callable[[float], None]:
    """Return a `sleep` that ends the leading process when a condition holds."""

    def sleep(seconds: float) -> None:
        if is_time():
            raise Killed
        time.sleep(0.005)

    return sleep


def test_stages_run_in_order_and_branches_side_by_side(world: World) -> None:
    """Each stage follows what it reads. Two stages run at the same time, three never."""
    spec = branches()
    spec.stages["left"].parameters["wait"] = "right.txt"  # the left branch ends only after the right one
    world.run(spec).execute(max_parallel=2)
    assert (world.root / "join.txt").read_text() == str(2 * (5 * 2 * 2 + 1 + 5 * 2 * 2 + 2))
    assert world.calls()[0] == "first"
    assert world.calls()[-1] == "join"
    assert world.jobs.most == 2


def test_every_stage_is_an_event_with_times_inputs_outputs_and_exit_code(world: World) -> None:
    """The ledger has the start of the run and of each stage, and how each ended."""
    world.run(branches()).execute(max_parallel=1)
    [started] = world.events(PipelineStarted)
    assert [stage["name"] for stage in started["stages"]] == STAGES
    assert [event["stage"] for event in world.events(StageStarted)] == STAGES
    finished = world.events(StageFinished)
    assert [event["stage"] for event in finished] == STAGES
    join = finished[-1]
    assert join["exit_code"] == 0
    assert join["state"] == "done"
    assert set(join["inputs"]) == {str(world.root / name) for name in ("left.txt", "right.txt")}
    assert set(join["outputs"]) == {str(world.root / "join.txt")}
    assert join["result"] == {"total": 43, "metrics.auc": 0.9}
    assert join["seconds"] > 0
    assert world.events(PipelineFinished)[0]["state"] == "done"


def test_a_second_run_does_nothing(world: World) -> None:
    """All stages are known to be done, and nothing is recorded."""
    world.run(branches()).execute(max_parallel=2)
    events = world.ledger.head()
    assert world.run(branches(), "r2").is_done()
    assert world.ledger.head() == events


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda world, spec: (world.root / "source.txt").write_text("6"), ["first", "join", "left", "right"]),
        (lambda world, spec: (world.root / "factor.py").write_text("FACTOR = 3"), ["first", "join", "left", "right"]),
        (lambda world, spec: spec.stages["left"].parameters.update(add=5), ["join", "left"]),
        (lambda world, spec: (world.root / "right.txt").unlink(), ["right"]),
        (lambda world, spec: (world.root / "join.txt").write_text("0"), ["join"]),
        (lambda world, spec: setattr(spec.stages["first"], "always", True), ["first"]),
    ],
    ids=["input", "imported code", "parameter", "output removed", "output changed", "always"],
)  # fmt: skip
def test_what_has_changed_is_run_again_and_nothing_else(
    world: World, change: Callable[[World, PipelineSpec], object], again: list[str]
) -> None:
    """A stage depends on the content of its inputs, its code and its parameters. Equal content stops the chain."""
    world.run(branches()).execute(max_parallel=1)
    before, spec = len(world.calls()), branches()
    change(world, spec)
    assert not world.run(spec, "r2").is_done()
    world.run(spec, "r2").execute(max_parallel=1)
    assert sorted(world.calls()[before:]) == again
    reused = {name for name, stage in world.state("r2").stages.items() if stage.reused_from == "r1"}
    assert reused == set(STAGES) - set(again)


def test_a_failed_requirement_stops_the_run_and_leaves_nothing_visible(world: World) -> None:
    """The reason names the value. The stage's file is as it was before, and no later stage has run."""
    world.run(branches()).execute(max_parallel=1)
    earlier = (world.root / "first.txt").read_text()
    (world.root / "source.txt").write_text("7")
    spec = branches()
    spec.stages["first"].require = {"auc": 0.95, "total": ">0"}
    with pytest.raises(
        StageRefused, match=r"Stage 'first' does not meet a requirement: auc is 0\.9, but must be >= 0\.95"
    ):
        world.run(spec, "r2").execute(max_parallel=1)
    assert (world.root / "first.txt").read_text() == earlier
    assert world.states("r2") == {"first": "unmet", "left": "waiting", "right": "waiting", "join": "waiting"}
    spec.stages["first"].require = {"auc": 0.9}
    world.run(spec, "r2").execute(max_parallel=1)
    assert world.states("r2") == dict.fromkeys(STAGES, "done")
    assert (world.root / "first.txt").read_text() == "14"
    assert not list(world.root.glob(".*.before"))


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        ("refused", StageRefused, "Stage 'left' was refused: the rows are not good enough."),
        ("1", StageFailed, "Stage 'left' failed: copy_number exited 1."),
    ],
)
def test_a_failed_stage_removes_its_output_and_its_run_goes_on_after_the_fault_is_mended(
    world: World, end: str, error: type[Exception], message: str
) -> None:
    """The other branch ends, and its results stay. The run continues under its id at the failed stage."""
    spec = branches()
    spec.stages["left"].parameters["end"] = end
    with pytest.raises(error, match=message):
        world.run(spec).execute(max_parallel=2)
    assert not (world.root / "left.txt").exists()
    assert world.states()["right"] == "done"
    assert world.state().state == "failed"
    world.run(branches()).execute(max_parallel=2)
    assert world.states() == dict.fromkeys(STAGES, "done")
    assert sorted(world.calls()) == ["first", "join", "left", "left", "right"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("moment", ["before the job", "while it runs", "after it ended"])
def test_a_run_whose_leader_was_killed_goes_on_with_equal_results(
    world: World, stage: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stage runs twice: a job that was submitted is found again. One that was not submitted is submitted."""
    if moment == "before the job":
        submit = world.jobs.submit

        def killed(job: str, *arguments: object, **options: object) -> None:
            if f"-{stage}-" in job:
                raise Killed
            submit(job, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(world.jobs, "submit", killed)
    job = f"p-r1-{stage}-1"

    def is_time() -> bool:
        if moment == "before the job" or job not in world.jobs.processes:
            return False
        if moment == "after it ended":
            world.jobs.processes[job].wait()
        return True

    with pytest.raises(Killed):
        world.run(branches(), sleep=kill_at(world, is_time)).execute(max_parallel=1)
    assert world.states()[stage] == "running"
    monkeypatch.undo()
    monkeypatch.chdir(world.root)
    monkeypatch.syspath_prepend(str(world.root))
    monkeypatch.setenv("FALAJ_PROJECT_ROOT", str(world.root))
    world.run(branches()).execute(max_parallel=1)
    assert world.calls() == STAGES
    assert world.states() == dict.fromkeys(STAGES, "done")
    assert (world.root / "join.txt").read_text() == "86"


def test_a_killed_job_is_submitted_again(world: World) -> None:
    """The half-written file of the first attempt is removed."""
    spec = branches()
    spec.stages["first"].parameters["wait"] = "go"

    def is_time() -> bool:
        job = world.jobs.processes.get("p-r1-first-1")
        if job is not None and world.calls():
            job.kill()
            job.wait()
        return False

    with pytest.raises(StageFailed, match="copy_number was killed"):
        world.run(spec, sleep=kill_at(world, is_time)).execute(max_parallel=1)
    (world.root / "go").touch()
    world.run(spec).execute(max_parallel=1)
    assert world.state().stages["first"].attempts == 2


def test_a_job_with_other_parameters_is_ended_before_the_stage_starts_again(world: World) -> None:
    """The leader was killed, and the pipeline was changed while its job ran."""
    spec = branches()
    spec.stages["first"].parameters["wait"] = "never"
    with pytest.raises(Killed):
        world.run(spec, sleep=kill_at(world, lambda: bool(world.calls()))).execute(max_parallel=1)
    world.run(branches()).execute(max_parallel=1)
    assert world.jobs.processes["p-r1-first-1"].poll() is not None
    assert world.state().stages["first"].job == "p-r1-first-2"


def test_a_cancelled_run_ends_its_jobs(world: World) -> None:
    """The files of the stage that was running are as before."""
    spec = branches()
    spec.stages["first"].parameters["wait"] = "never"

    def cancel() -> bool:
        if world.calls() and not world.events(PipelineCancelled):
            world.ledger.append(PipelineCancelled(pipeline="p", run="r1", reason="wrong data"), actor="bob")
        return False

    with pytest.raises(RunCancelled):
        world.run(spec, sleep=kill_at(world, cancel)).execute(max_parallel=1)
    assert world.states()["first"] == "cancelled"
    assert world.state().state == "cancelled"
    assert not (world.root / "first.txt").exists()


def test_a_value_of_a_result_is_a_parameter_of_a_later_stage(world: World) -> None:
    """A text that is one reference keeps the value's type. A missing value is named."""
    spec = PipelineSpec(
        stages={
            "one": copy("one", "source.txt", "one.txt"),
            "two": copy("two", "source.txt", "two.txt", add="{one.total}"),
        }
    )
    world.run(spec).execute(max_parallel=1)
    assert (world.root / "two.txt").read_text() == "15"
    spec.stages["two"].parameters["add"] = "{one.nothing}"
    with pytest.raises(StageRefused, match=r"Stage 'two' uses \{one\.nothing\}"):
        world.run(spec, "r2").execute(max_parallel=1)


def test_stages_of_an_earlier_release_are_taken_over(world: World) -> None:
    """They are not run again. The stages after them are."""
    (world.root / "first.txt").write_text("10")
    world.run(branches()).adopt({"first": EarlierStage(3.0, {"total": 5})})
    assert world.states()["first"] == "done"
    world.run(branches()).execute(max_parallel=1)
    assert world.calls() == ["left", "right", "join"]
    assert world.state().stages["first"].seconds == 3.0


def test_a_demo_of_an_earlier_release_goes_on(world: World) -> None:
    """Its `state.json` is read once. What the ledger has counts afterwards."""
    demo = world.root / "demo"
    demo.mkdir()
    (world.root / "first.txt").write_text("10")
    (demo / "state.json").write_text(json.dumps({"first": {"seconds": 4.0, "commands": []}}))

    def adopt(run: str, earlier: Mapping[str, EarlierStage]) -> None:
        world.run(branches(), run).adopt(earlier)

    pipeline: Any = SimpleNamespace(name="p", ledger=world.ledger, adopt=adopt)
    adopt_earlier_state(pipeline, demo)
    head = world.ledger.head()
    assert world.states(EARLIER_RUN) == {
        "first": "done",
        "left": "waiting",
        "right": "waiting",
        "join": "waiting",
    }
    adopt_earlier_state(pipeline, demo)
    assert world.ledger.head() == head
