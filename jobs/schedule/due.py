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
CROWDED = "missed: too many slots waited"
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


def has_room(spec: ScheduleSpec, *, num_unfinished: int) -> bool:
    """Return whether one more slot may wait, besides the one that runs."""
    return spec.overlap is Overlap.skip or num_unfinished <= spec.max_waiting


def cron_slots(
    spec: ScheduleSpec,
    *,
    since: dt.datetime,
    now: dt.datetime,
    num_unfinished: int = 0,
    was_crowded: bool = False,
) -> list[Due | Skipped]:
    """Return what to do about the slots after `since`, up to `now`, in order.

    While too many slots wait, nothing is decided. A later call decides, and then a slot can be missed. If a clock is
    set back, `now` lies before `since`, and no slot is due until the clock has passed `since` again.

    Args:
        spec: The schedule.
        since: The last slot that was decided, or the time at which the schedule was applied.
        now: The present time.
        num_unfinished: How many slots of this schedule are due and not finished.
        was_crowded: Whether too many slots waited at the last check. It decides the reason of missed slots.
    """
    assert spec.cron is not None
    if not has_room(spec, num_unfinished=num_unfinished):
        return []
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
        reason = CROWDED if was_crowded else MISSED
        decisions += _missed(spec, first=first, last=last, count=count, reason=reason)
    for slot in in_time:
        num_due = num_unfinished + sum(isinstance(decision, Due) for decision in decisions)
        if not has_room(spec, num_unfinished=num_due):
            break
        decisions.append(_in_time(spec, slot, is_running=num_due > 0))
    return decisions


def event_slot(spec: ScheduleSpec, *, position: str, reason: str, is_running: bool) -> Due | Skipped:
    """Return what to do about an event that triggers a schedule."""
    slot = f"event-{position}"
    if is_running and spec.overlap is Overlap.skip:
        return Skipped(first=slot, last=slot, count=1, reason=RUNNING, position=position)
    return Due(slot=slot, reason=reason, position=position)


def _missed(
    spec: ScheduleSpec, *, first: dt.datetime, last: dt.datetime, count: int, reason: str
) -> list[Due | Skipped]:
    if spec.missed is Missed.skip:
        return [_skipped(first, last, count, reason)]
    run = Due(
        slot=_text(last),
        reason=f"missed, runs once for {count} slot{'s' if count > 1 else ''}",
        position=_text(last),
    )
    if count == 1:
        return [run]
    before = Skipped(
        first=_text(first), last=_text(last), count=count - 1, reason=reason, position=_text(first)
    )
    return [before, run]


def _in_time(spec: ScheduleSpec, slot: dt.datetime, *, is_running: bool) -> Due | Skipped:
    if is_running and spec.overlap is Overlap.skip:
        return _skipped(slot, slot, 1, RUNNING)
    return Due(slot=_text(slot), reason="cron", position=_text(slot))


def _skipped(first: dt.datetime, last: dt.datetime, count: int, reason: str) -> Skipped:
    return Skipped(first=_text(first), last=_text(last), count=count, reason=reason, position=_text(last))


def _text(instant: dt.datetime) -> str:
    return instant.astimezone(dt.UTC).isoformat(timespec="seconds")
