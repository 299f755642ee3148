"""The demo's stages as data. Each stage has a title and command lines that can be run again by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.storage import layout, resolve
from jobs.pipeline.config import PipelineConfig

Results = dict[str, Any]
"""JSON outputs of earlier stages, by file name without suffix."""
Command = tuple[str, ...]
"""Module and arguments of a command line."""
ParallelCommands = tuple[Command, ...]
"""Commands that do not depend on each other and run in parallel."""
VIEWS = ("person", "cohort")
"""Feature views of the demo."""
LOG_WAIT_S = 300
"""Longest wait for the records of other nodes, in seconds. A segment is open for `storage.upload_after_s`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of the demo."""

    name: str
    title: str
    steps: Callable[[Results], Sequence[ParallelCommands]]
    """Function from the outputs of earlier stages to the steps of this stage. Steps run one after another, the commands
    of one step in parallel."""


def plan(config: PipelineConfig, demo: Path) -> list[Stage]:
    """Return all stages in order."""
    commands = Commands(config, demo)
    return [
        *_data_stages(config, commands),
        *_training_stages(commands),
        _deployment_stage(config, commands),
        *(stage for year in config.years for stage in _year_stages(config, commands, year)),
        _fixed_stage(
            "monitor",
            "Estimate and realise performance, look for drift (NannyML)",
            *commands.read_log(commands.monitor()),
        ),
        *_broken_version_stages(config, commands),
    ]


class Commands:
    """Builds the command lines of one demo run."""

    def __init__(self, config: PipelineConfig, demo: Path) -> None:
        self._config = config
        self._demo = demo
        self._source = resolve("data/census")
        self._name = f"name={config.name}"
        self._training_set = f"training_set={demo}/train.parquet"
        self._label = f"label={config.label}"

    def ingest(self, year: int) -> ParallelCommands:
        return tuple(
            ("feature_jobs.ingest", f"view={view}", f"source.path={self._source}/{view}_{year}.parquet")
            for view in VIEWS
        )

    def materialize(self, year: int) -> ParallelCommands:
        return tuple(
            ("feature_jobs.materialize", f"view={view}", f"as_of={_end_of_year(year)}") for view in VIEWS
        )

    def training_set(self) -> Command:
        entities = f"entities={self._source}/entities_{self._config.reference_year}.parquet"
        return (
            "feature_jobs.training_set",
            f"service={self._config.name}",
            entities,
            f"output={self._demo}/train.parquet",
        )

    def train(self, model: str, output: str, *options: str) -> Command:
        data = (self._name, self._training_set, self._label)
        return ("jobs.train", f"model={model}", *data, *options, f"output={self._demo}/{output}.json")

    def train_with_best(self, model: str, output: str) -> Command:
        return self.train(model, output, f"params_from={self._demo}/sweep.json")

    def sweep(self) -> Command:
        return ("jobs.sweep", self._name, self._training_set, self._label, f"output={self._demo}/sweep.json")

    def evaluate(self, candidate: str, results: Results) -> Command:
        version = f"version={results[candidate]['version']}"
        slices = "slices=[person__SEX,person__RAC1P]"
        output = f"output={self._demo}/evaluate_{candidate}.json"
        return ("jobs.evaluate", self._name, self._training_set, version, slices, output)

    def deploy(self, version: int) -> Command:
        return ("serve_apps.deploy", self._name, f"version={version}", "variant=champion")

    def start_rollout(self, version: int, *, weight: float, variant: str) -> Command:
        options = (f"version={version}", f"weight={weight:g}", f"variant={variant}")
        return ("serve_apps.rollout", "action=start", self._name, *options)

    def end_rollout(self, reason: str) -> Command:
        return ("serve_apps.rollout", "action=rollback", self._name, f"reason={reason}")

    def check_rollout(self) -> Command:
        return ("serve_apps.rollout", "action=check", self._name, f"output={self._demo}/check.json")

    def score(self, year: int, *, offset: int, count: int, batch: str) -> list[ParallelCommands]:
        """Return the commands that score people of one year, then post the outcomes of these people."""
        people = f"people={self._source}/entities_{year}.parquet"
        answers = f"answers={self._demo}/answers_{batch}.parquet"
        options = (f"as_of={_end_of_year(year)}", f"requests={count}", f"offset={offset}")
        observed_at = f"observed_at={year + 1}-03-31T00:00:00Z"
        return [
            (("jobs.pipeline.traffic", self._name, people, answers, *options),),
            (("jobs.pipeline.outcomes", self._name, people, answers, observed_at),),
        ]

    def read_log(self, command: Command) -> list[ParallelCommands]:
        """Return a command that reads the log. With several nodes, it first waits for their records."""
        wait = ("cluster.records.nodes", f"wait_s={LOG_WAIT_S}")
        return [(wait,), (command,)] if layout(self._config.storage).shared else [(command,)]

    def monitor(self) -> Command:
        reference, output = f"reference={self._demo}/train.parquet", f"output={self._demo}/monitor.json"
        return ("jobs.monitor", self._name, reference, self._label, output)


def _data_stages(config: PipelineConfig, commands: Commands) -> list[Stage]:
    year = config.reference_year
    return [
        _fixed_stage(
            "source",
            "Unpack the census: people, outcomes and published cohort rates per year",
            (("feature_jobs.census.source",),),
        ),
        _fixed_stage("apply", "Apply the feature definitions", (("feature_jobs.apply",),)),
        _fixed_stage(f"ingest_{year}", f"Ingest {year}: validate, quarantine, store", commands.ingest(year)),
        _fixed_stage("training_set", "Point-in-time join: the training set", (commands.training_set(),)),
    ]


def _training_stages(commands: Commands) -> list[Stage]:
    return [
        _fixed_stage(
            "train_lightgbm",
            "Train candidate one: gradient-boosted trees (LightGBM)",
            (commands.train("lightgbm", "lightgbm"),),
        ),
        _fixed_stage(
            "sweep", "Sweep learning rate and width of candidate two (Ray Tune)", (commands.sweep(),)
        ),
        _fixed_stage(
            "train_network",
            "Train candidate two: a tabular network (Ray Train + DeepSpeed, two workers)",
            (commands.train_with_best("tabular_network", "network"),),
        ),
        Stage(
            name="evaluate",
            title="Evaluate both on held-out people, by sex and race",
            steps=lambda results: [
                tuple(commands.evaluate(candidate, results) for candidate in ("lightgbm", "network"))
            ],
        ),
    ]


def _deployment_stage(config: PipelineConfig, commands: Commands) -> Stage:
    weight = config.challenger_weight
    return Stage(
        name="deploy",
        title=f"Deploy both; {weight:g}% of units go to the challenger",
        steps=lambda results: [
            (commands.deploy(results["lightgbm"]["version"]),),
            (commands.start_rollout(results["network"]["version"], weight=weight, variant="challenger"),),
        ],
    )


def _year_stages(config: PipelineConfig, commands: Commands, year: int) -> list[Stage]:
    count = config.requests_per_year
    return [
        _fixed_stage(
            f"ingest_{year}",
            f"{year} arrives: ingest and bring the online store up to its last day",
            commands.ingest(year),
            commands.materialize(year),
        ),
        _fixed_stage(
            f"serve_{year}",
            f"Score {count} people of {year} through the edge; their outcomes follow",
            *commands.score(year, offset=0, count=count, batch=str(year)),
        ),
    ]


def _broken_version_stages(config: PipelineConfig, commands: Commands) -> list[Stage]:
    weight = config.broken_weight
    traffic = commands.score(
        config.years[-1], offset=config.requests_per_year, count=config.broken_requests, batch="broken"
    )
    return [
        _fixed_stage(
            "train_broken",
            "Train a third version on permuted labels: broken on purpose",
            (commands.train("lightgbm", "broken", "label_permutation=true"),),
        ),
        _fixed_stage(
            "end_first_rollout",
            "End the first rollout: the trees stay champion",
            (commands.end_rollout("the trees stay champion"),),
        ),
        Stage(
            name="serve_broken",
            title=f"Give the broken version {weight:g}% of units",
            steps=lambda results: [
                (commands.start_rollout(results["broken"]["version"], weight=weight, variant="broken"),),
                *traffic,
            ],
        ),
        _fixed_stage(
            "rollback",
            "The rule compares realised performance and rolls back",
            *commands.read_log(commands.check_rollout()),
        ),
    ]


def _fixed_stage(name: str, title: str, *steps: ParallelCommands) -> Stage:
    """Return a stage whose command lines do not depend on the outputs of earlier stages."""
    return Stage(name=name, title=title, steps=lambda _: steps)


def _end_of_year(year: int) -> str:
    return f"{year}-12-31T23:59:59Z"
