"""What the demo does, as data: each stage is a title and the command lines that anybody can run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.pipeline.config import PipelineConfig

Results = dict[str, Any]
"""File stem to the JSON content of each output written so far."""
Command = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of the demo."""

    name: str
    title: str
    commands: Callable[[Results], Sequence[Command]]
    """Module and arguments of each command; later stages read the outputs of earlier ones."""
    outputs: tuple[str, ...] = ()
    """JSON files below the demo's folder that the stage writes, without suffix."""


def plan(config: PipelineConfig, demo: Path) -> list[Stage]:
    """All stages in order."""
    source = demo.parent / "source" / "census"
    return [
        *_data(source, demo, config),
        *_training(demo, config),
        _deployment(config),
        *(stage for year in config.years for stage in _year(config, source, demo, year)),
        _monitoring(demo, config),
        *_broken(config, source, demo),
    ]


def _data(source: Path, demo: Path, config: PipelineConfig) -> list[Stage]:
    reference = config.reference_year
    return [
        Stage(
            name="source",
            title="Unpack the census: people, outcomes and published cohort rates per year",
            commands=lambda _: [("feature_jobs.census.source",)],
        ),
        Stage(
            name="apply", title="Apply the feature definitions", commands=lambda _: [("feature_jobs.apply",)]
        ),
        Stage(
            name=f"ingest_{reference}",
            title=f"Ingest {reference}: validate, quarantine, store",
            commands=lambda _: _ingest(source, reference),
        ),
        Stage(
            name="training_set",
            title="Point-in-time join: the training set",
            commands=lambda _: [
                (
                    "feature_jobs.training_set",
                    f"service={config.name}",
                    f"entities={source}/entities_{reference}.parquet",
                    f"output={demo}/train.parquet",
                )
            ],
        ),
    ]


def _training(demo: Path, config: PipelineConfig) -> list[Stage]:
    data = (f"training_set={demo}/train.parquet", f"name={config.name}", f"label={config.label}")
    return [
        Stage(
            name="train_lightgbm",
            title="Train candidate one: gradient-boosted trees (LightGBM)",
            commands=lambda _: [("jobs.train", "model=lightgbm", *data, f"output={demo}/lightgbm.json")],
            outputs=("lightgbm",),
        ),
        Stage(
            name="sweep",
            title="Sweep learning rate and width of candidate two (Ray Tune)",
            commands=lambda _: [("jobs.sweep", "model=tabular_network", *data, f"output={demo}/sweep.json")],
            outputs=("sweep",),
        ),
        Stage(
            name="train_network",
            title="Train candidate two: a tabular network (Ray Train + DeepSpeed, two workers)",
            commands=lambda _: [
                (
                    "jobs.train",
                    "model=tabular_network",
                    *data,
                    f"params_from={demo}/sweep.json",
                    f"output={demo}/network.json",
                )
            ],
            outputs=("network",),
        ),
        Stage(
            name="evaluate",
            title="Evaluate both on held-out people, by sex and race",
            commands=lambda results: [
                (
                    "jobs.evaluate",
                    f"name={config.name}",
                    f"training_set={demo}/train.parquet",
                    f"version={results[candidate]['version']}",
                    "slices=[person__SEX,person__RAC1P]",
                    f"output={demo}/evaluate_{candidate}.json",
                )
                for candidate in ("lightgbm", "network")
            ],
            outputs=("evaluate_lightgbm", "evaluate_network"),
        ),
    ]


def _deployment(config: PipelineConfig) -> Stage:
    def commands(results: Results) -> list[Command]:
        champion, challenger = results["lightgbm"]["version"], results["network"]["version"]
        return [
            ("serve_apps.deploy", f"name={config.name}", f"version={champion}", "variant=champion"),
            _start(config, challenger, weight=config.challenger_weight, variant="challenger"),
        ]

    return Stage(
        name="deploy",
        title=f"Deploy both; {config.challenger_weight:g}% of units go to the challenger",
        commands=commands,
    )


def _year(config: PipelineConfig, source: Path, demo: Path, year: int) -> list[Stage]:
    end = f"{year}-12-31T23:59:59Z"
    return [
        Stage(
            name=f"ingest_{year}",
            title=f"{year} arrives: ingest and bring the online store up to its last day",
            commands=lambda _: [
                *_ingest(source, year),
                *(
                    ("feature_jobs.materialize", f"view={view}", f"as_of={end}")
                    for view in ("person", "cohort")
                ),
            ],
        ),
        Stage(
            name=f"serve_{year}",
            title=f"Score {config.requests_per_year} people of {year} through the edge; their outcomes follow",
            commands=lambda _: _score(config, source, demo, year, offset=0, count=config.requests_per_year),
        ),
    ]


def _monitoring(demo: Path, config: PipelineConfig) -> Stage:
    return Stage(
        name="monitor",
        title="Estimate and realise performance, look for drift (NannyML)",
        commands=lambda _: [
            (
                "jobs.monitor",
                f"name={config.name}",
                f"reference={demo}/train.parquet",
                f"label={config.label}",
                f"output={demo}/monitor.json",
            )
        ],
        outputs=("monitor",),
    )


def _broken(config: PipelineConfig, source: Path, demo: Path) -> list[Stage]:
    year = config.years[-1]
    return [
        Stage(
            name="train_broken",
            title="Train a third version on permuted labels: broken on purpose",
            commands=lambda _: [
                (
                    "jobs.train",
                    "model=lightgbm",
                    f"training_set={demo}/train.parquet",
                    f"name={config.name}",
                    f"label={config.label}",
                    "label_permutation=true",
                    f"output={demo}/broken.json",
                )
            ],
            outputs=("broken",),
        ),
        Stage(
            name="end_first_rollout",
            title="End the first rollout: the trees stay champion",
            commands=lambda _: [
                (
                    "serve_apps.rollout",
                    "action=rollback",
                    f"name={config.name}",
                    "reason=the trees stay champion",
                )
            ],
        ),
        Stage(
            name="serve_broken",
            title=f"Give the broken version {config.broken_weight:g}% of units",
            commands=lambda results: [
                _start(config, results["broken"]["version"], weight=config.broken_weight, variant="broken"),
                *_score(
                    config,
                    source,
                    demo,
                    year,
                    offset=config.requests_per_year,
                    count=config.broken_requests,
                    name="broken",
                ),
            ],
        ),
        Stage(
            name="rollback",
            title="The rule compares realised performance and rolls back",
            commands=lambda _: [
                ("serve_apps.rollout", "action=check", f"name={config.name}", f"output={demo}/check.json")
            ],
            outputs=("check",),
        ),
    ]


def _ingest(source: Path, year: int) -> list[Command]:
    return [
        ("feature_jobs.ingest", f"view={view}", f"source.path={source}/{view}_{year}.parquet")
        for view in ("person", "cohort")
    ]


def _start(config: PipelineConfig, version: int, *, weight: float, variant: str) -> Command:
    return (
        "serve_apps.rollout",
        "action=start",
        f"name={config.name}",
        f"version={version}",
        f"weight={weight:g}",
        f"variant={variant}",
    )


def _score(
    config: PipelineConfig,
    source: Path,
    demo: Path,
    year: int,
    *,
    offset: int,
    count: int,
    name: str | None = None,
) -> list[Command]:
    people, answers = (
        f"people={source}/entities_{year}.parquet",
        f"answers={demo}/answers_{name or year}.parquet",
    )
    return [
        (
            "jobs.pipeline.traffic",
            f"name={config.name}",
            people,
            answers,
            f"as_of={year}-12-31T23:59:59Z",
            f"requests={count}",
            f"offset={offset}",
        ),
        (
            "jobs.pipeline.outcomes",
            f"name={config.name}",
            people,
            answers,
            f"observed_at={year + 1}-03-31T00:00:00Z",
        ),
    ]
