"""Decides which slots of a schedule are due, and which are skipped. Pure functions over plain data."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from jobs.schedule.config import Missed, Overlap, ScheduleSpec
from jobs.schedule.cron import last_slot_before, slots_after

MAX_SLOTS = 1000
"""Slots within the grace time that are considered at once at most; the next check finds the others."""
MAX_MISSED = 20_000
"""Missed slots that are counted at most. The others have no effect, and to compute those of a year would stop all other
schedules for minutes."""
MISSED = "missed: no scheduler ran"
RUNNING = "the last run goes on"


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """A slot that must run."""

    slot: str
    reason: str
    position: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """Slots that do not run, as one event."""

    first: str
    last: str
    count: int
    reason: str
    position: str


def cron_slots(
    spec: ScheduleSpec, *, since: dt.datetime, now: dt.datetime, is_running: bool
) -> list[Due | Skipped]:
    """Return what to do about the slots after `since`, up to `now`, in order.

    If a clock is set back, `now` lies before `since`, and no slot is due until the clock has passed `since` again.

    Args:
        spec: The schedule.
        since: The last slot that was decided, or the time at which the schedule was applied.
        now: The present time.
        is_running: Whether a slot of this schedule is not finished.
    """
    assert spec.cron is not None
    late = now - dt.timedelta(seconds=spec.grace_s)
    first, last, count = None, None, 0
    in_time: list[dt.datetime] = []
    slots = slots_after(spec.cron, spec.time_zone, since)
    while (slot := next(slots, None)) is not None and slot <= now:
        if slot < late:
            first, last, count = first or slot, slot, count + 1
            if count == MAX_MISSED:
                last = max(slot, last_slot_before(spec.cron, spec.time_zone, late))
                slots = slots_after(spec.cron, spec.time_zone, last)
        else:
            in_time.append(slot)
            if len(in_time) == MAX_SLOTS:
                break
    decisions: list[Due | Skipped] = []
    if first is not None and last is not None:
        decisions += _missed(spec, first=first, last=last, count=count)
    for slot in in_time:
        decisions.append(_in_time(spec, slot, is_running=is_running or _any_due(decisions)))
    return decisions


def event_slot(spec: ScheduleSpec, *, position: str, reason: str, is_running: bool) -> Due | Skipped:
    """Return what to do about an event that triggers a schedule."""
    slot = f"event-{position}"
    if is_running and spec.overlap is Overlap.skip:
        return Skipped(first=slot, last=slot, count=1, reason=RUNNING, position=position)
    return Due(slot=slot, reason=reason, position=position)


def _missed(spec: ScheduleSpec, *, first: dt.datetime, last: dt.datetime, count: int) -> list[Due | Skipped]:
    if spec.missed is Missed.skip:
        return [_skipped(first, last, count, MISSED)]
    run = Due(
        slot=_text(last),
        reason=f"missed, runs once for {count} slot{'s' if count > 1 else ''}",
        position=_text(last),
    )
    if count == 1:
        return [run]
    before = Skipped(
        first=_text(first), last=_text(last), count=count - 1, reason=MISSED, position=_text(first)
    )
    return [before, run]


def _any_due(decisions: list[Due | Skipped]) -> bool:
    return any(isinstance(decision, Due) for decision in decisions)


def _in_time(spec: ScheduleSpec, slot: dt.datetime, *, is_running: bool) -> Due | Skipped:
    if is_running and spec.overlap is Overlap.skip:
        return _skipped(slot, slot, 1, RUNNING)
    return Due(slot=_text(slot), reason="cron", position=_text(slot))


def _skipped(first: dt.datetime, last: dt.datetime, count: int, reason: str) -> Skipped:
    return Skipped(first=_text(first), last=_text(last), count=count, reason=reason, position=_text(last))


def _text(instant: dt.datetime) -> str:
    return instant.astimezone(dt.UTC).isoformat(timespec="seconds")
