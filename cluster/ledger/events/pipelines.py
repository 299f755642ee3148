"""Events of pipelines: their runs and the stages of each run."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineStarted(LedgerEvent):
    """A run started, or a stopped run continues."""

    pipeline: str
    run: str
    stages: list[Json]
    """`name`, `command`, `after`, `require`, `title` and `group` of each stage. Each follows what it waits for."""
    resumed: bool = False
    reason: str = ""
    """`earlier release` if the stages were done before the ledger recorded pipelines; else empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted(LedgerEvent):
    """A stage is about to be submitted as a job. The event precedes the job, so that the job can be found again."""

    pipeline: str
    run: str
    stage: str
    job: str
    """Submission id of the Ray job."""
    key: str
    """Hash of the stage's command, parameters, code and inputs."""
    arguments: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFinished(LedgerEvent):
    pipeline: str
    run: str
    stage: str
    job: str
    key: str
    state: str
    """`done`, `failed`, `refused` (exit code 2), `unmet` (a requirement failed) or `cancelled`."""
    exit_code: int | None = None
    """None if the job ended without one, for example because its process was killed."""
    started_at: str = ""
    seconds: float = 0.0
    inputs: dict[str, str] = field(default_factory=dict)
    """Maps input to the hash of its content."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Maps output to the hash of its content."""
    result: dict[str, Json] = field(default_factory=dict)
    """Texts and numbers of the stage's result. Nested names are joined by dots."""
    reason: str = ""
    """Why the stage is not done."""
    reused_from: str = ""
    """Run in which the stage did its work, if it was not run again; empty if it ran in this run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFinished(LedgerEvent):
    pipeline: str
    run: str
    state: str
    """`done`, `failed` or `cancelled`."""
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineCancelled(LedgerEvent):
    """An operator cancelled a run. The process that leads the run ends it when it reads this event."""

    pipeline: str
    run: str
    reason: str
