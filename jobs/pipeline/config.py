"""Configuration of `jobs.pipeline`, and of the pipelines in `configs/pipeline/` and in users' own folders."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from cluster.settings import PlatformConfig


class PipelineAction(enum.Enum):
    """What to do with the pipeline."""

    plan = "plan"
    """Check everything, and print which stages would run. Nothing is run."""
    run = "run"
    show = "show"
    """Print the stages of a run with their states."""
    cancel = "cancel"


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage: a command, and what it waits for."""

    command: str = MISSING
    """Module to run, as in `python -m <module>`: one of Falaj's commands, or the user's own."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Options of the command. `{stage.name}` in a text is a value of an earlier stage's result. `{outputs.name}` and
    `{inputs.name}` are paths of this stage."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Files and folders that the command reads, by any name. Those of Falaj's commands need not be listed."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Files and folders that the command writes, by any name. `result` is a JSON file with the stage's result."""
    after: list[str] = field(default_factory=list)
    """Stages that must be done first. Stages whose files or results this stage uses need not be listed."""
    require: dict[str, Any] = field(default_factory=dict)
    """What the result must satisfy: `auc: 0.88` means at least 0.88, `rows: ">0"` compares, another text must be
    equal."""
    code: list[str] = field(default_factory=list)
    """More modules whose change makes the stage run again. Modules that the command imports need not be listed."""
    enabled: bool = True
    """Whether the stage is part of the pipeline. If not, the stages after it wait for the stages that it waits for."""
    always: bool = False
    """Run the stage in each run, for example because its source is a database."""
    title: str = ""
    """What the stage does, for readers."""
    group: str = ""
    """Name of a group of stages. The report shows a group as one stage."""


@dataclass(kw_only=True, slots=True)
class PipelineSpec:
    """A pipeline, as declared in `configs/pipeline/<name>.yaml`."""

    vars: dict[str, Any] = field(default_factory=dict)
    """Values for the stages, as `${pipeline.vars.<name>}`."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """The stages by name."""
    max_parallel: int | None = None
    """How many stages run at the same time at most. Null is the number of this machine's CPUs."""

    def __post_init__(self) -> None:
        if self.max_parallel is not None and self.max_parallel < 1:
            raise ValueError(f"pipeline.max_parallel must be at least 1, or null, got {self.max_parallel}.")


@dataclass(kw_only=True, slots=True)
class PipelineConfig(PlatformConfig):
    """Configuration of `jobs.pipeline`."""

    pipeline: PipelineSpec | None = None
    """The pipeline: `pipeline=<name>` selects `configs/pipeline/<name>.yaml`."""
    action: PipelineAction = PipelineAction.run
    run: str | None = None
    """Id of a run. With null, `run` continues the newest run if it is unfinished or failed, else it starts a new one.
    The other actions use the newest run."""
    reason: str = "by command"
    """Why the run is cancelled."""
    output: str | None = None
    """HTML page to write with action=show."""
