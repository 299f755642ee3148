"""What the key of a stage depends on, and which stages are run in each run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cluster import entrypoint
from cluster.ledger.events import DeploymentRemoved, LedgerEvent, ModelDeployed, StageFinished
from jobs.pipeline.config import PipelineSpec, StageConfig
from jobs.pipeline.graph import build_graph
from jobs.pipeline.keys import MAX_RUN_CHARS, Prepared, StageKeys, stage_command
from jobs.pipeline.plan import Caller, make_plan
from jobs.pipeline.stage.content import CodeHashes, Platform
from jobs.sweep.config import MAX_RUN, SweepConfig
from jobs.train.config import check_run
from tests.unit.jobs.pipeline.conftest import World, copy

MODEL = Path(__file__).parents[4] / "configs" / "model" / "lightgbm.yaml"
SHOP = """
from feature_jobs.store import FeatureService
from tests.projects.views import make_view
credit = FeatureService("credit", views=[make_view()])
"""


def prepare(world: World, name: str, caller: Caller | None = None, **stages: StageConfig) -> Prepared:
    caller = caller or world.caller()
    plan = make_plan(PipelineSpec(stages=stages), caller)
    assert plan.faults == ()
    platform = Platform(world.ledger, world.places)
    keys = StageKeys("p", plan, ledger=world.ledger, platform=platform, config_dir=caller.config_dir)
    return keys.prepare(name, {})


def train(**parameters: str) -> StageConfig:
    common = {"name": "loan", "training_set": "source.txt", "label": "y"}
    return StageConfig(command="jobs.train", parameters=common | parameters)


def test_a_changed_configuration_file_changes_the_key(world: World) -> None:
    """The file is not named in the stage, except for `model: mine`."""
    folder = world.root / "conf" / "model"
    folder.mkdir(parents=True)
    file = folder / "mine.yaml"
    file.write_text(MODEL.read_text())
    caller = dataclasses.replace(world.caller(), config_dir=str(world.root / "conf"))
    before = prepare(world, "t", caller, t=train(model="mine")).key
    assert prepare(world, "t", caller, t=train(model="mine")).key == before
    file.write_text(MODEL.read_text().replace("learning_rate: ", "learning_rate: 9"))
    entrypoint._compose_once.cache_clear()
    assert prepare(world, "t", caller, t=train(model="mine")).key != before


def test_each_attempt_of_a_stage_continues_one_training_run(world: World) -> None:
    """The id of the training run depends on the pipeline's run and on the key, and a stage can have its own."""

    def run_of(pipeline_run: str, **parameters: str) -> str:
        prepared = prepare(world, "fit", fit=train(**parameters))
        return stage_command(prepared, run=pipeline_run)[-1]

    first = run_of("nightly 7")
    check_run(first.removeprefix("run="))
    assert first.startswith("run=p-nightly-7-fit-")
    assert run_of("nightly 7") == first
    assert len({first, run_of("nightly 8"), run_of("nightly 7", seed="1")}) == 3
    long = [run_of("r" * 63 + end).removeprefix("run=") for end in ("a", "b")]
    assert long[0] != long[1]
    for run in long:
        check_run(run)
        SweepConfig(name="m", training_set="t", label="y", run=run)
    assert MAX_RUN_CHARS == MAX_RUN
    assert run_of("nightly 7", run="mine") == "run=mine"
    assert stage_command(prepare(world, "copied", copied=copy("c", "source.txt", "c.txt")), run="r")[
        -1
    ].startswith("write=")


def test_the_callers_platform_options_are_in_the_key_and_the_identity_is_not(world: World) -> None:
    """Who runs a stage changes nothing of what it does."""
    first = prepare(world, "t", t=train(model="lightgbm")).key
    for option, is_same in (("identity.purpose=other", True), ("tier=enterprise_gpu", False)):
        options = dataclasses.replace(world.caller(), options=(option,))
        assert (prepare(world, "t", options, t=train(model="lightgbm")).key == first) is is_same, option


@pytest.mark.parametrize("changed", ["steps/clean.py", "mylib/__init__.py", "mylib/c.py"])
def test_code_in_plain_folders_and_of_parent_packages_counts(world: World, changed: str) -> None:
    """A folder without `__init__.py` counts as the user's code. The import of a module runs its packages."""
    for path in ("steps", "mylib"):
        (world.root / path).mkdir()
    for path, text in {
        "steps/clean.py": "import mylib.c\n",
        "mylib/__init__.py": "",
        "mylib/c.py": "",
    }.items():
        (world.root / path).write_text(text)
    before = CodeHashes().digest(["steps.clean"])
    (world.root / changed).write_text("import mylib.c\nx = 2\n")
    assert CodeHashes().digest(["steps.clean"]) != before


def test_a_training_set_depends_on_the_rows_of_its_views(world: World) -> None:
    """The view that a service reads may be applied by an earlier stage."""
    (world.root / "shop.py").write_text(SHOP)
    stages = {
        "apply": StageConfig(command="feature_jobs.apply", parameters={"definitions": "shop"}),
        "training_set": StageConfig(
            command="feature_jobs.training_set",
            parameters={"service": "credit", "entities": "source.txt", "output": "t.parquet"},
            after=["apply"],
        ),
    }
    plan = world.plan(PipelineSpec(stages=stages))
    assert plan.faults == ()
    assert {"service:credit", "view:income"} <= set(plan.stages["training_set"].reads)


def test_a_stage_that_depends_on_the_time_or_on_a_log_runs_in_each_run(world: World) -> None:
    """With a fixed instant, it does not."""
    (world.root / "shop.py").write_text(SHOP)
    apply = StageConfig(command="feature_jobs.apply", parameters={"definitions": "shop"})

    def is_always(command: str, **parameters: object) -> bool:
        stage = StageConfig(command=command, parameters=parameters, after=["apply"])
        plan = world.plan(PipelineSpec(stages={"apply": apply, "s": stage}))
        assert plan.faults == ()
        return plan.stages["s"].facts.always

    assert is_always("feature_jobs.materialize", view="income")
    assert is_always("feature_jobs.materialize", view="all")
    assert is_always("feature_jobs.retain", view="income")
    assert not is_always("feature_jobs.materialize", view="income", as_of="2020-01-01T00:00:00Z")


def test_the_path_of_an_output_is_in_the_key(world: World) -> None:
    spec = copy("a", "source.txt", "a.txt")
    other = dataclasses.replace(spec, outputs=spec.outputs | {"more": "b.txt"})
    assert prepare(world, "a", a=spec).key != prepare(world, "a", a=other).key


def test_a_reader_of_a_folder_or_pattern_waits_for_its_writers() -> None:
    """Also if the writer's file is below the folder that is read."""
    graph = build_graph(
        PipelineSpec(
            stages={
                "a": StageConfig(command="x", outputs={"o": "/d/a.parquet"}),
                "b": StageConfig(command="y", inputs={"i": "/d"}),
                "c": StageConfig(command="y", inputs={"i": "/d/*.parquet"}),
                "d": StageConfig(command="y", inputs={"i": "/d/*.csv"}),
                "e": StageConfig(command="y", inputs={"i": "/other/*.parquet"}),
            }
        )
    )
    assert graph.faults == ()
    assert {name: stage.after for name, stage in graph.stages.items()} == {
        "a": (),
        "b": ("a",),
        "c": ("a",),
        "d": (),
        "e": (),
    }


def test_a_removed_deployment_is_done_again(world: World) -> None:
    """Only the version that the stage deployed counts. If a caller deploys it again by hand, the stage is done."""
    stage = StageConfig(command="serve_apps.deploy", parameters={"name": "loan", "version": "2"})
    plan = make_plan(PipelineSpec(stages={"d": stage}), world.caller())
    keys = StageKeys("p", plan, ledger=world.ledger, platform=Platform(world.ledger, world.places))
    prepared = keys.prepare("d", {})
    done = StageFinished(
        pipeline="p",
        run="r1",
        stage="d",
        job="j",
        key=prepared.key,
        state="done",
        exit_code=0,
        seconds=1.0,
        result={"version": 2},
    )

    def is_done_after(event: LedgerEvent) -> bool:
        world.ledger.append(event, actor="alice")
        return keys.reusable(prepared, "r2") is not None

    deployed = ModelDeployed(
        name="loan", version=2, variant="champion", app="loan-v2", route_prefix="/loan-v2"
    )
    removed = DeploymentRemoved(name="loan", version=2, app="loan-v2", reason="by command")
    world.ledger.append(deployed, actor="alice")
    assert is_done_after(done)
    assert is_done_after(dataclasses.replace(removed, version=1, app="loan-v1"))
    assert not is_done_after(removed)
    assert is_done_after(deployed)
    assert not is_done_after(removed)
    assert is_done_after(done)
