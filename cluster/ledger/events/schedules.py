"""Events of schedules: their definitions, and the slots that ran or were skipped."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleApplied(LedgerEvent):
    """A schedule was defined, or defined anew. Its runs act with this principal's rights."""

    schedule: str
    definition: dict[str, Json]
    folder: str
    """Folder in which the command runs."""
    config_dir: str | None
    """Folder of the caller's own configurations, as `--config-dir` gave it."""
    principal: dict[str, Json]
    """`subject`, `role`, `purpose`, `tenant` and `models` of the caller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleStateChanged(LedgerEvent):
    schedule: str
    state: str
    """`active`, `paused` or `removed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRunDue(LedgerEvent):
    """A slot must run. It runs exactly once, also if processes are killed after this event."""

    schedule: str
    slot: str
    reason: str
    position: str = ""
    """How far the schedule has come with this slot: an instant, a `seq` or a digest. Empty if a person triggered it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRunSkipped(LedgerEvent):
    """Slots that will not run."""

    schedule: str
    first: str
    last: str
    count: int
    reason: str
    position: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRunStarted(LedgerEvent):
    """The process of a slot started. A second process of the same slot finds this event and does nothing."""

    schedule: str
    slot: str
    job: str
    """Submission id of the Ray job."""
    command: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRunFinished(LedgerEvent):
    schedule: str
    slot: str
    job: str
    state: str
    """`done`, `refused` (exit code 2), `failed`, `lost` (its process ended without a result) or `not started`."""
    exit_code: int | None = None
    seconds: float = 0.0
    reason: str = ""
    """Last line of the command's errors, or why there is no result."""
