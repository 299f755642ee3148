"""The schedules in the ledger: definition, state, and the slots that are not finished."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cluster.errors import ConfigError, did_you_mean, first_line
from cluster.known_fields import known_fields
from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import (
    ScheduleApplied,
    ScheduledRunDue,
    ScheduledRunFinished,
    ScheduledRunSkipped,
    ScheduledRunStarted,
    ScheduleStateChanged,
)
from cluster.security.authorization.policy import Resource
from jobs.command_states import DONE
from jobs.schedule.config import ScheduleSpec, TriggerKind

ACTIVE, PAUSED, REMOVED = "active", "paused", "removed"
MAX_RUNS = 100
"""Largest number of runs that `last_success` reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A schedule as the ledger has it."""

    name: str
    spec: ScheduleSpec
    folder: str
    config_dir: str | None
    principal: dict[str, Any]
    applied_at: dt.datetime
    applied_seq: int
    """`seq` of the last event that applied or resumed it. Nothing before this event starts a run."""
    state: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A slot that is due and not finished."""

    key: str
    reason: str
    due_seq: int


def definition_of(spec: ScheduleSpec) -> dict[str, Any]:
    """Return a schedule's definition as JSON values."""
    content = OmegaConf.to_container(OmegaConf.structured(spec), enum_to_str=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def spec_of(definition: dict[str, Any]) -> ScheduleSpec:
    """Return the definition that an event has. Fields of a newer release are left out.

    Raises:
        ConfigError: It is not a definition of this release.
    """
    own = known_fields(ScheduleSpec, definition)
    try:
        spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ScheduleSpec), own))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(
            f"This release cannot read the schedule's definition: {first_line(error)}. Apply the schedule again."
        ) from error
    assert isinstance(spec, ScheduleSpec)
    return spec


def names(ledger: Ledger) -> list[str]:
    """Return the names of all schedules that are not removed."""
    applied = dict.fromkeys(entry.payload["schedule"] for entry in ledger.entries(ScheduleApplied))
    return sorted(name for name in applied if events_of(ledger, name) is not None)


def events_of(ledger: Ledger, name: str) -> tuple[Entry, Entry] | None:
    """Return the event that applied a schedule, and the one that decides its state, which can be the same.

    Return None if there is no schedule of this name or it was removed.
    """
    applied = ledger.newest(ScheduleApplied, schedule=name)
    if applied is None:
        return None
    changed = ledger.newest(ScheduleStateChanged, schedule=name)
    if changed is None or changed.seq < applied.seq:
        return applied, applied
    return None if changed.payload["state"] == REMOVED else (applied, changed)


def find(ledger: Ledger, name: str) -> Schedule | None:
    """Return a schedule, or None if there is none of this name or it was removed.

    Raises:
        ConfigError: Its definition is not one of this release.
    """
    events = events_of(ledger, name)
    if events is None:
        return None
    applied, since = events
    state = ACTIVE if since is applied else str(since.payload["state"])
    return Schedule(
        name=name,
        spec=spec_of(applied.payload["definition"]),
        folder=str(applied.payload["folder"]),
        config_dir=applied.payload["config_dir"],
        principal=dict(applied.payload["principal"]),
        applied_at=time_of(since),
        applied_seq=since.seq,
        state=state,
    )


def require(ledger: Ledger, name: str) -> Schedule:
    """Return a schedule.

    Raises:
        ConfigError: There is none of this name.
    """
    schedule = find(ledger, name)
    if schedule is None:
        raise ConfigError(f"No schedule '{name}'.{did_you_mean(name, names(ledger))}")
    return schedule


def resource(name: str, *, owner: str, region: str) -> Resource:
    """Return a schedule as the target of an action.

    Args:
        name: Its name.
        owner: The subject that applied it; "" if there is no such schedule.
        region: The region of the process that decides.
    """
    return Resource(kind="schedule", name=name, registered_by=owner, region=region)


def unfinished(ledger: Ledger, name: str) -> list[Slot]:
    """Return the slots that are due and not finished, in order.

    A schedule runs one slot at a time, in order, so all slots up to the last finished one are finished.
    """
    finished = last_finished(ledger, name)
    last = None if finished is None else finished.payload["slot"]
    slots: list[Slot] = []
    for entry in ledger.find(ScheduledRunDue, newest_first=True, schedule=name):
        key = str(entry.payload["slot"])
        if key == last:
            break
        slots.append(Slot(key=key, reason=str(entry.payload["reason"]), due_seq=entry.seq))
    return slots[::-1]


def position(ledger: Ledger, schedule: Schedule) -> str:
    """Return how far a schedule has come since it was applied or resumed, or "" if it had no slot since then.

    The position of a trigger on data is the hash of all files, so an older one still counts.
    """
    is_of_data = schedule.spec.trigger is not None and schedule.spec.trigger.kind is TriggerKind.data
    events = [
        ledger.newest(ScheduledRunDue, having="position", schedule=schedule.name),
        ledger.newest(ScheduledRunSkipped, having="position", schedule=schedule.name),
    ]
    newest = max((entry for entry in events if entry is not None), key=lambda entry: entry.seq, default=None)
    if newest is None or (newest.seq < schedule.applied_seq and not is_of_data):
        return ""
    return str(newest.payload["position"])


def has_started(ledger: Ledger, name: str, slot: str) -> bool:
    """Return whether the process of a slot has started."""
    return ledger.newest(ScheduledRunStarted, schedule=name, slot=slot) is not None


def last_finished(ledger: Ledger, name: str) -> Entry | None:
    """Return the event of the last run that ended."""
    return ledger.newest(ScheduledRunFinished, schedule=name)


def last_success(ledger: Ledger, name: str) -> dt.datetime | None:
    """Return when the last successful run ended, or None if none of the last `MAX_RUNS` runs succeeded."""
    finished = ledger.find(ScheduledRunFinished, newest_first=True, schedule=name)
    done = (entry for entry in islice(finished, MAX_RUNS) if entry.payload["state"] == DONE)
    return next((time_of(entry) for entry in done), None)


def skipped(ledger: Ledger, name: str) -> Iterator[Entry]:
    """Yield the events of skipped slots, the newest first."""
    return ledger.find(ScheduledRunSkipped, newest_first=True, schedule=name)


def time_of(entry: Entry) -> dt.datetime:
    """Return the time of an entry."""
    return dt.datetime.fromisoformat(entry.time)
