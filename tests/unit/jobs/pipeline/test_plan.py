"""The plan of a pipeline: everything is checked before anything runs, with one line for each fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hydra import compose, initialize_config_module

from cluster.security.tokens.roles import Role
from cluster.settings_conversion import load
from jobs.pipeline.config import PipelineConfig, PipelineSpec, StageConfig
from jobs.pipeline.graph import build_graph
from jobs.pipeline.keys import StageKeys
from jobs.pipeline.stage.content import Platform
from jobs.pipeline.stage.results import RESULTS
from tests.unit.jobs.pipeline.conftest import World, branches, copy

OWN_COMMAND = """
from dataclasses import dataclass
from cluster.entrypoint import job
from cluster.settings import PlatformConfig

@dataclass(kw_only=True, slots=True)
class CheckConfig(PlatformConfig):
    path: str = "???"
    min_rows: int = 1

    def __post_init__(self) -> None:
        if self.min_rows < 1:
            raise ValueError(f"min_rows must be at least 1, got {self.min_rows}.")

@job(None, CheckConfig)
def main(config: CheckConfig) -> dict[str, int]:
    return {"rows": config.min_rows}
"""


def composed(*overrides: str) -> PipelineSpec:
    with initialize_config_module("configs", version_base=None):
        config = load(compose("pipeline", overrides=list(overrides)), PipelineConfig)
    assert config.pipeline is not None
    return config.pipeline


def stage(command: str, **values: Any) -> StageConfig:
    return StageConfig(
        command=command,
        **{key: values.pop(key) for key in ("after", "outputs", "require") if key in values},
        parameters=values,
    )


def faults(world: World, role: Role = Role.admin, **stages: StageConfig) -> list[str]:
    return list(world.plan(PipelineSpec(stages=stages), role).faults)


def test_requirement_whose_name_will_be_ambiguous_is_a_fault(world: World) -> None:
    """With slices, each slice has every metric, so the plan asks for the whole name. Other names are single."""
    demo = composed("pipeline=census")
    for required, fault in (
        ({"auc": 0.8}, "require.auc: the result has several values of this name"),
        ({"metrics.auc": 0.8, "family": "lightgbm", "rows": ">0"}, None),
    ):
        demo.stages["evaluate_lightgbm"].require = required
        found = list(world.plan(demo).faults)
        assert len(found) == (fault is not None), found
        assert fault is None or f"Stage 'evaluate_lightgbm': {fault}" in found[0]
    demo.stages["evaluate_lightgbm"].parameters["slices"] = []
    demo.stages["evaluate_lightgbm"].require = {"auc": 0.8}
    assert world.plan(demo).faults == ()


def test_clients_of_the_demo_have_no_defaults_of_the_census(world: World) -> None:
    """The pipeline's file names model, key, label and purpose, so the clients serve every model."""
    census = composed("pipeline=census").stages
    for name, expected in (
        ("traffic_2017", {"name": "employment", "key": "person_id", "purpose": "employment_statistics"}),
        ("outcomes_broken", {"name": "employment", "key": "person_id", "label": "employed"}),
    ):
        assert expected.items() <= census[name].parameters.items()
    [fault] = faults(world, a=stage("jobs.pipeline.traffic", people="x", answers="y", as_of="2020-01-01"))
    assert "name" in fault


def test_the_demo_has_no_faults(world: World) -> None:
    """The census pipeline can be planned in an empty installation. Each stage follows what it needs."""
    plan = world.plan(composed("pipeline=census"))
    assert plan.faults == ()
    keys = StageKeys("census", plan, ledger=world.ledger, platform=Platform(world.ledger, world.places))
    assert [name for name in plan.stages if keys.runs_always(name)] == []  # so a second run does nothing
    order = list(plan.stages)
    assert order.index("training_set") < order.index("ingest_2016_person") < order.index("traffic_2016")
    assert {"train_lightgbm", "sweep"} <= plan.graph.ancestors("train_network")
    assert plan.stages["training_set"].writes == (
        str(world.root / ".falaj/demo/train.parquet"),
        str(world.root / ".falaj/demo/train.manifest.json"),
    )


def test_the_demos_durations_keep_their_names() -> None:
    """`summary.json` and the state of earlier releases use these names of stages and groups."""
    years = [name for year in (2016, 2017, 2018) for name in (f"ingest_{year}", f"serve_{year}")]
    names = [
        "source", "apply", "ingest_2015", "training_set", "train_lightgbm", "sweep", "train_network", "evaluate",
        "deploy", *years, "monitor", "train_broken", "end_first_rollout", "serve_broken", "rollback",
    ]  # fmt: skip
    stages = composed("pipeline=census").stages
    assert {stage.group or name for name, stage in stages.items() if stage.enabled} == set(names)


def test_a_stage_is_left_out_added_or_replaced_by_configuration_alone(world: World) -> None:
    """Stages after one that is left out wait for what it waits for."""
    spec = composed(
        "pipeline=census",
        "+pipeline.stages.sweep.enabled=false",
        "pipeline.stages.train_network.parameters.params_from=null",
        "pipeline.stages.train_lightgbm.command=feature_jobs.apply",
        "+pipeline.stages.materialize_2016.enabled=false",
        "+pipeline.stages.check={command: copy_number, after: [training_set]}",
    )
    graph = build_graph(spec)
    assert graph.faults == ()
    assert "sweep" not in graph.stages
    assert graph.stages["train_lightgbm"].command == "feature_jobs.apply"
    assert graph.stages["check"].after == ("training_set",)
    assert {"ingest_2016_person", "start_rollout"} <= set(graph.stages["traffic_2016"].after)


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        (
            {"a": copy("a", "b.txt", "a.txt"), "b": copy("b", "a.txt", "b.txt")},
            "Stages wait for each other: a → b → a.",
        ),
        ({"a": copy("a", "nowhere.txt", "a.txt")}, "nowhere.txt does not exist, and no earlier stage writes it."),
        (
            {"a": copy("a", "source.txt", "x.txt"), "b": copy("b", "source.txt", "x.txt")},
            "both write",
        ),
        ({"a": copy("a", "source.txt", "a.txt", after=["frist"])}, "`after` names no stage 'frist'."),
        ({"a": copy("a", "source.txt", "a.txt", add="{frist.x}")}, "{frist.x} names no stage."),
        ({"a": copy("a", "source.txt", "a.txt", add="{outputs.x}")}, "{outputs.x} is not in its outputs."),
        ({"a": copy("a", "source.txt", "a.txt", require={"rows": ">many"})}, "require.rows is '>many'."),
        ({"a": stage("no_such_module")}, "No module 'no_such_module'."),
        ({"a": stage("feature_jobs.ingest", vew="person")}, "No option 'vew'. Did you mean 'view'?"),
        (
            {"a": stage("feature_jobs.ingest", view="person", max_bad_share=3)},
            "max_bad_share must be between 0 and 1, got 3",
        ),
        ({"a": stage("feature_jobs.materialize", view="x")}, "unknown view 'x', and no earlier stage makes it."),
        ({"a": stage("serve_apps.deploy", name="loan")}, "unknown model 'loan', and no earlier stage makes it."),
        ({"A-b": stage("copy_number")}, "a name has small letters"),
        ({}, "The pipeline has no stages."),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_that_names_the_stage(
    world: World, stages: dict[str, StageConfig], fault: str
) -> None:
    """What is wrong, where, and what to do."""
    [line] = [line for line in faults(world, **stages) if fault in line]
    assert "\n" not in line
    assert line.startswith(("Stage '", "Stages ", "The pipeline"))


def test_all_faults_are_named_at_once(world: World) -> None:
    """Two stages with an invalid parameter and one with a missing file."""
    found = faults(
        world,
        a=stage("feature_jobs.ingest", view="person", num_buckets=0),
        b=stage("feature_jobs.ingest", view="person", nothing=1),
        c=copy("c", "nowhere.txt", "c.txt"),
    )
    assert [line.partition(":")[0] for line in found] == ["Stage 'a'", "Stage 'b'", "Stage 'c'"]


def test_a_users_own_command_is_checked_against_its_own_schema(world: World) -> None:
    """Its module declares a dataclass, and needs no file in `configs/`."""
    (world.root / "own_check.py").write_text(OWN_COMMAND)
    assert faults(world, a=stage("own_check", path="x", min_rows=2)) == []
    assert "min_rows must be at least 1" in faults(world, a=stage("own_check", path="x", min_rows=0))[0]
    assert "No option 'pth'" in faults(world, a=stage("own_check", pth="x"))[0]
    assert "a value is needed" in faults(world, a=stage("own_check"))[0]


@pytest.mark.parametrize(
    ("role", "denied"),
    [
        (Role.admin, []),
        (Role.data_engineer, ["training_set", "train"]),
        (Role.data_scientist, ["apply", "ingest"]),
        (Role.auditor, ["apply", "ingest", "training_set", "train"]),
    ],
)
def test_the_caller_needs_the_rights_of_every_stage(world: World, role: Role, denied: list[str]) -> None:
    """The policies decide, with the views that an earlier stage will apply."""
    people = world.root / "people.parquet"
    people.touch()
    found = faults(
        world,
        role,
        apply=stage("feature_jobs.apply"),
        ingest=stage("feature_jobs.ingest", view="person", source={"path": str(people)}, after=["apply"]),
        training_set=stage(
            "feature_jobs.training_set", service="employment", entities=str(people), output="t.parquet",
            after=["ingest"],
        ),
        train=stage("jobs.train", name="m", training_set="t.parquet", label="y", model="lightgbm"),
    )  # fmt: skip
    stages = {line.split("'")[1] for line in found if line.split(": ")[1].startswith("Role ")}
    assert stages == set(denied)


def test_a_plain_script_is_not_imported(world: World) -> None:
    """A script without a guard would do its work while it is planned."""
    (world.root / "plain.py").write_text("open('ran', 'w').write('')\n")
    assert faults(world, a=stage("plain")) == []
    assert not (world.root / "ran").exists()


def test_planning_runs_nothing(world: World) -> None:
    """No event is appended, and no file is written."""
    head, files = world.ledger.head(), set(world.root.iterdir())
    assert world.plan(branches()).faults == ()
    assert world.ledger.head() == head
    assert {path for path in world.root.iterdir() if path.name != "__pycache__"} == files


def test_the_pipelines_own_folder_of_configurations(tmp_path: Path) -> None:
    """A file in a folder that is on Hydra's search path is a pipeline like ours."""
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "mine.yaml").write_text(
        json.dumps({"stages": {"a": {"command": "copy_number"}}})
    )
    spec = composed(f"hydra.searchpath=['file://{tmp_path}']", "pipeline=mine")
    assert list(spec.stages) == ["a"]


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        (
            {"a": StageConfig(command="copy_number", inputs={"i": "q/in.csv"}, outputs={"o": "q"})},
            "which is moved aside then",
        ),
        (
            {
                "a": StageConfig(command="copy_number", outputs={"o": "q"}),
                "b": StageConfig(command="copy_number", outputs={"o": "q/b.txt"}),
            },
            "of which one is in the other",
        ),
        (
            {
                "a": copy("a", "source.txt", "a.txt"),
                "b": StageConfig(command="copy_number", outputs={"o": "b_{a.total}.txt"}),
            },
            "{a.total} is in its inputs or outputs",
        ),
        ({"a": StageConfig(command="copy_number", code=["no_rules"])}, "no module 'no_rules'"),
        ({"a": stage("cluster.down")}, "cluster.down cannot be a stage"),
        ({"a": stage("own.step")}, "'own.step' cannot be imported: RuntimeError: boom"),
    ],
)  # fmt: skip
def test_what_would_lose_files_or_go_wrong_later_is_a_fault(
    world: World, stages: dict[str, StageConfig], fault: str
) -> None:
    """One line each. A module that fails while it is imported is a fault too."""
    (world.root / "own").mkdir()
    (world.root / "own" / "__init__.py").write_text("raise RuntimeError('boom')\n")
    (world.root / "own" / "step.py").write_text("from cluster.entrypoint import job\n")
    assert [line for line in faults(world, **stages) if fault in line]


def test_a_packages_init_is_not_run_to_find_a_plain_script(world: World) -> None:
    (world.root / "own").mkdir()
    (world.root / "own" / "__init__.py").write_text("raise RuntimeError('boom')\n")
    (world.root / "own" / "step.py").write_text("x = 1\n")
    assert faults(world, a=stage("own.step")) == []


def test_an_import_and_an_export_of_a_model_are_known(world: World) -> None:
    """The bundle must exist, and the export needs the model."""
    found = faults(
        world,
        a=stage("jobs.import_model", file="m.falaj"),
        b=stage("jobs.export_model", name="m", output="b.falaj"),
    )
    assert any("m.falaj does not exist" in line for line in found)
    assert any("unknown model 'm'" in line for line in found)


FIGURES = """
from dataclasses import dataclass
from cluster.entrypoint import job
from cluster.settings import PlatformConfig

@dataclass(kw_only=True, slots=True)
class FiguresConfig(PlatformConfig):
    pass

@job(None, FiguresConfig)
def main(config: FiguresConfig) -> dict[str, float]:
    return figures()

def figures() -> dict[str, float]:
    return {"rows": 1, "missing_share": 0.0}
"""


@pytest.mark.parametrize(
    ("require", "fault"),
    [
        (
            {"missing_shre": "<=0.05"},
            "require.missing_shre: the result has no value of this name. Did you mean 'missing_share'?",
        ),
        ({"missing_share": "<=0.05", "rows": ">0"}, None),
        ({"something_else": 1}, None),
        ({"missing_share.age": "<=0.05"}, None),
    ],
)
def test_a_misspelled_figure_of_an_own_command_is_a_fault(
    world: World, require: dict[str, Any], fault: str | None
) -> None:
    """The source of the command shows its figures. It may have others that the source does not show."""
    (world.root / "figures_check.py").write_text(FIGURES)
    found = faults(world, a=stage("figures_check", require=require))
    assert found == ([f"Stage 'a': {fault}"] if fault else [])


@pytest.mark.parametrize(
    ("command", "name", "is_fault"),
    [
        ("feature_jobs.training_set", "hidden_share.guests", False),
        ("feature_jobs.training_set", "hiden_share", True),
        ("jobs.evaluate", "slices.sex.1.auc", False),
        ("jobs.evaluate", "metric.auc", True),
    ],
)
def test_a_value_below_a_known_name_is_not_misspelled(command: str, name: str, is_fault: bool) -> None:
    """The names below it, such as views and slices, are not known before the run."""
    assert bool(RESULTS[command].fault(name)) == is_fault


@pytest.mark.parametrize(
    ("label", "require", "columns", "fault"),
    [
        ("y", {"auc": 0.8}, ["person_id", "event_timestamp", "y"], None),
        ("yy", {}, ["person_id", "event_timestamp", "y"], "has no label 'yy'. Did you mean 'y'?"),
        ("income__age", {}, ["person_id", "event_timestamp"], None),
        ("y", {"metrics.acu": 0.8}, ["person_id", "event_timestamp", "y"], "Did you mean 'metrics.auc'?"),
        ("y", {"auuc": 0.8}, ["person_id", "event_timestamp", "y"], "Did you mean 'auc'?"),
        ("y", {}, ["person", "event_timestamp", "y"], "has no column 'person_id'. Did you mean 'person'?"),
        ("y", {}, ["person_id", "y"], "has no column 'event_timestamp'."),
    ],
)
def test_a_wrong_label_key_or_metric_is_a_fault(
    world: World, label: str, require: dict[str, Any], columns: list[str], fault: str | None
) -> None:
    """The file of the entities exists before the run, and the training set is made of it.

    It needs no join key that is a feature of an earlier view.
    """
    (world.root / "store.py").write_text(
        "from feature_jobs.store import Entity, FeatureService, Field\n"
        "from tests.projects.views import make_view\n"
        'income = make_view(schema=[Field("amount", "float64"), Field("area", "string")])\n'
        'rent = make_view("rent", entities=[Entity("area", join_keys=["area"])])\n'
        'credit = FeatureService("credit", views=[income, rent])\n'
    )
    pl.DataFrame({name: ["1"] for name in columns}).write_parquet(world.root / "people.parquet")
    found = faults(
        world,
        apply=stage("feature_jobs.apply", definitions="store"),
        rows=stage(
            "feature_jobs.training_set",
            service="credit",
            entities="people.parquet",
            output="t.parquet",
            after=["apply"],
        ),
        train=stage(
            "jobs.train",
            name="loan",
            training_set="t.parquet",
            label=label,
            model="lightgbm",
            require=require,
        ),
    )
    assert len(found) == (fault is not None), found
    assert fault is None or fault in found[0]
