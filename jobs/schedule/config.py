"""Configuration of `jobs.schedule`, and of the schedules in `configs/schedule/` and in users' own folders."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from cluster.settings import PlatformConfig


class ScheduleAction(enum.Enum):
    """What to do with a schedule."""

    list = "list"
    """Print all schedules with their next slot and last run."""
    apply = "apply"
    """Store the schedule `schedule=<name>` in the ledger. Its runs act with the caller's rights."""
    pause = "pause"
    resume = "resume"
    trigger = "trigger"
    """Run the schedule's command once, now."""
    remove = "remove"


class TriggerKind(enum.Enum):
    """An event after which a schedule runs."""

    pipeline = "pipeline"
    """A run of the pipeline `of` is done."""
    drift = "drift"
    """Monitoring found a chunk of the model `of` outside its thresholds, or all its versions have become worse."""
    outcomes = "outcomes"
    """The model `of` has got `count` outcomes since the last slot."""
    data = "data"
    """A file below the URI `of` is new or has changed."""
    always = "always"
    """The command has ended. So a stream runs without end."""


class Missed(enum.Enum):
    """What to do about slots that passed while no scheduler ran."""

    run_once = "run_once"
    """Run the last of them."""
    skip = "skip"


class Overlap(enum.Enum):
    """What to do about a slot that is due while the schedule's last run goes on."""

    wait = "wait"
    skip = "skip"


@dataclass(kw_only=True, slots=True)
class TriggerSpec:
    """An event after which a schedule runs."""

    kind: TriggerKind
    of: str = ""
    """Name of the pipeline or model, or URI of the data."""
    count: int = 1
    """Number of outcomes."""

    def __post_init__(self) -> None:
        if not self.of and self.kind is not TriggerKind.always:
            raise ValueError(f"schedule.trigger.of must name what {self.kind.value} is of.")
        if self.count < 1:
            raise ValueError(f"schedule.trigger.count must be at least 1, got {self.count}.")


@dataclass(kw_only=True, slots=True)
class ScheduleSpec:
    """A schedule, as declared in `configs/schedule/<name>.yaml`."""

    cron: str | None = None
    """Five fields: minute, hour, day of the month, month, day of the week. A sixth field means seconds."""
    time_zone: str = "UTC"
    """IANA name, such as `Asia/Dubai`."""
    trigger: TriggerSpec | None = None
    """Instead of `cron`."""
    command: str = "jobs.pipeline"
    """Module to run, as in `python -m <module>`."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Options of the command."""
    missed: Missed = Missed.run_once
    grace_s: float = 60.0
    """A slot that is at most this many seconds late is not missed."""
    overlap: Overlap = Overlap.wait
    max_waiting: int = 10
    """With overlap=wait: at most this many slots wait for the current run. A slot that finds no room within its grace
    time is missed, and one event counts all of these. A trigger that finds no room starts one run later."""
    timeout_s: float | None = None
    """A run is ended after this many seconds. Null sets no limit."""

    def __post_init__(self) -> None:
        if (self.cron is None) == (self.trigger is None):
            raise ValueError("A schedule needs either schedule.cron or schedule.trigger.")
        if self.grace_s < 0:
            raise ValueError(f"schedule.grace_s must not be negative, got {self.grace_s}.")
        if self.max_waiting < 1:
            raise ValueError(f"schedule.max_waiting must be at least 1, got {self.max_waiting}.")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise ValueError(f"schedule.timeout_s must be positive, or null, got {self.timeout_s}.")


@dataclass(kw_only=True, slots=True)
class ScheduleConfig(PlatformConfig):
    """Configuration of `jobs.schedule`."""

    schedule: ScheduleSpec | None = None
    """With action=apply, `schedule=<name>` selects `configs/schedule/<name>.yaml`."""
    action: ScheduleAction = ScheduleAction.list
    name: str | None = None
    """Name of a schedule, for the other actions."""
