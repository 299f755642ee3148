"""Events of jobs that callers submit at the edge (`POST /v1/jobs`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSubmitted(LedgerEvent):
    """A job was accepted. It runs at most once, also if processes are killed after this event."""

    job: str
    """Id of the job, and submission id of its Ray job."""
    submitter: str
    """Subject of the caller's token."""
    module: str
    overrides: list[str]
    content: str
    """Hash of module, overrides and principal. A second request with the same client key must have the same."""
    principal: dict[str, Json]
    """`subject`, `role`, `purpose`, `tenant` and `models` of the caller. The job acts with these rights."""
    config_dir: str | None = None
    """The installation's folder of configurations, as `--config-dir` gives it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRefused(LedgerEvent):
    """A caller tried to run what no job may run, or to set what no job may set."""

    submitter: str
    role: str
    module: str
    """Empty if it is no name of a module."""
    option: str
    """Name of the forbidden option, without its value; empty if it has no valid name."""
    rule: str
    """Which rule forbids it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStarted(LedgerEvent):
    """The process of a job started. A second process of the same job finds this event and does nothing."""

    job: str
    command: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStopped(LedgerEvent):
    """The submitter or an admin stopped a job. `JobFinished` follows when its process has ended."""

    job: str
    subject: str
    """Who stopped it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFinished(LedgerEvent):
    job: str
    state: str
    """`done`, `refused` (exit code 2), `failed`, `stopped`, `lost` (its process ended without a result) or `not
    started`."""
    exit_code: int | None = None
    seconds: float = 0.0
    reason: str = ""
    """Last line of the command's errors, or why there is no result."""
