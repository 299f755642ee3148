"""The list of schedules, for readers."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

from cluster.errors import ConfigError
from cluster.ledger import Ledger
from jobs.schedule import schedules
from jobs.schedule.cron import slots_after
from jobs.schedule.schedules import ACTIVE, Schedule


def describe(ledger: Ledger, *, now: dt.datetime) -> Iterator[str]:
    """Yield lines about every schedule: when it runs, its state, its last run and what was skipped last."""
    names = schedules.names(ledger)
    if not names:
        yield "no schedule is applied"
    for name in names:
        try:
            schedule = schedules.find(ledger, name)
        except ConfigError as error:
            yield f"{name}  unreadable  {error}"
            continue
        if schedule is None:  # removed in the meantime
            continue
        yield f"{schedule.name}  {schedule.state}  {when(schedule)}  {schedule.spec.command}"
        if schedule.spec.cron is not None and schedule.state == ACTIVE:
            upcoming = next(slots_after(schedule.spec.cron, schedule.spec.time_zone, now), None)
            yield f"    next: {'never' if upcoming is None else _text(upcoming)}"
        for slot in schedules.unfinished(ledger, schedule.name):
            is_running = schedules.has_started(ledger, schedule.name, slot.key)
            yield f"    {'running' if is_running else 'waiting'}: {slot.key} ({slot.reason})"
        last = schedules.last_finished(ledger, schedule.name)
        if last is not None:
            run = last.payload
            reason = f": {run['reason']}" if run["reason"] else ""
            yield f"    last run: {run['slot']} {run['state']} after {run['seconds']:.1f} s{reason}"
        skipped = next(schedules.skipped(ledger, schedule.name), None)
        if skipped is not None:
            gap = skipped.payload
            yield f"    last skipped: {gap['count']} from {gap['first']} to {gap['last']} ({gap['reason']})"


def when(schedule: Schedule) -> str:
    """Return when a schedule runs."""
    if schedule.spec.cron is not None:
        return f"cron '{schedule.spec.cron}' {schedule.spec.time_zone}"
    assert schedule.spec.trigger is not None
    trigger = schedule.spec.trigger
    count = f" x {trigger.count}" if trigger.count > 1 else ""
    return f"after {trigger.kind.value} {trigger.of}{count}".rstrip()


def _text(instant: dt.datetime) -> str:
    return instant.isoformat(timespec="seconds")
