"""The scheduler's work: decide which slots are due, run them one after the other, and record how they ended.

Its only state is the ledger. A slot gets an event before its job is submitted, and the job's process appends another
event before it runs the command. Each of the two events is appended once, so a scheduler or a process that is killed at
any moment neither loses a slot nor runs it twice.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from cluster.errors import ConfigError, first_line
from cluster.ledger import Ledger
from cluster.ledger.events import ScheduledRunDue, ScheduledRunFinished, ScheduledRunSkipped
from cluster.ledger.store import utc_now
from jobs.command_states import LOST, NO_RESULT, NO_START, NOT_STARTED
from jobs.schedule import schedules, triggers
from jobs.schedule.due import Due, Skipped, cron_slots, event_slot, has_room
from jobs.schedule.metrics import SchedulerMetrics
from jobs.schedule.schedules import ACTIVE, Schedule, Slot

ACTOR = "system:scheduler"
TRIGGERS_EVERY_S = 5.0
AFTER_ERROR_S = 10.0
"""Seconds until a schedule is checked again after an error, for example while Ray's job API does not answer."""
LOG = logging.getLogger("falaj.scheduler")


class Jobs(Protocol):
    """Runs slots as jobs. `ray_jobs.SlotJobs` is the real one; tests have their own."""

    def submit(self, job: str, schedule: Schedule, slot: str) -> None:
        """Start the process of a slot under a submission id. If there is a job with this id, do nothing."""

    def is_over(self, job: str) -> bool | None:
        """Return whether a job has ended, or None if no job has this id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A schedule, and how far it has come."""

    schedule: Schedule
    position: str
    waiting: list[Slot]
    """Slots that are due and not finished, in order. The first one may run."""


class Scheduler:
    """Runs the schedules of one ledger.

    Args:
        ledger: The ledger.
        jobs: Runs slots.
        clock: Returns the present time, in UTC.
        metrics: Where figures are shown; not exported by default.
    """

    def __init__(
        self,
        ledger: Ledger,
        jobs: Jobs,
        *,
        clock: Callable[[], dt.datetime] = utc_now,
        metrics: SchedulerMetrics | None = None,
    ) -> None:
        self._ledger = ledger
        self._metrics = metrics or SchedulerMetrics(CollectorRegistry())
        self._jobs = jobs
        self._clock = clock
        self._triggers_checked_at: dict[str, float] = {}
        self._wait_until: dict[str, float] = {}
        self._crowded: set[str] = set()
        """Schedules of which too many slots waited at the last check."""
        self._read_at = -1
        self._states: list[State] = []
        self._unreadable: list[str] = []

    def check_once(self) -> None:
        """Check every schedule once. An error of one schedule does not stop the others."""
        is_healthy = True
        for state in self._read():
            name, now = state.schedule.name, time.monotonic()
            if now < self._wait_until.get(name, 0.0):
                continue
            try:
                self._check(state)
            except sa.exc.SQLAlchemyError:
                raise
            except Exception as error:  # noqa: BLE001 - a bad URI or file system of one must not stop the others
                self._wait_until[name], is_healthy = now + AFTER_ERROR_S, False
                LOG.warning("schedule %s: %s", name, first_line(error))
        if is_healthy and not self._unreadable:
            self._metrics.last_check.set_to_current_time()

    def _read(self) -> list[State]:
        """Return the states of all schedules. They are read again only if the ledger has new events."""
        head = self._ledger.head()
        if head != self._read_at:
            self._unreadable = []
            found = (self._find(name) for name in schedules.names(self._ledger))
            self._states = [state for state in found if state is not None]
            self._read_at = head
            self._metrics.clear()
            for state in self._states:
                success = schedules.last_success(self._ledger, state.schedule.name)
                self._metrics.show(state.schedule.name, last_success=success, unfinished=len(state.waiting))
        return self._states

    def _find(self, name: str) -> State | None:
        """Return the state of a schedule, or None if it is gone, or if this release cannot read its definition."""
        try:
            schedule = schedules.find(self._ledger, name)
            return None if schedule is None else self._state(schedule)
        except ConfigError as error:
            self._unreadable.append(name)
            LOG.warning("schedule %s: %s", name, error)
            return None

    def _state(self, schedule: Schedule) -> State:
        return State(
            schedule=schedule,
            position=schedules.position(self._ledger, schedule),
            waiting=schedules.unfinished(self._ledger, schedule.name),
        )

    def _check(self, state: State) -> None:
        schedule = state.schedule
        if schedule.state == ACTIVE and (decisions := self._decisions(state)):
            for decision in decisions:
                self._record(schedule, decision)
            state = self._state(schedule)
        if state.waiting:
            self._run(schedule, state.waiting[0])

    def _decisions(self, state: State) -> list[Due | Skipped]:
        schedule, position, is_running = state.schedule, state.position, bool(state.waiting)
        spec, num_unfinished = schedule.spec, len(state.waiting)
        if not has_room(spec, num_unfinished=num_unfinished):
            self._crowded.add(schedule.name)
            return []
        was_crowded = schedule.name in self._crowded
        self._crowded.discard(schedule.name)
        if spec.cron is not None:
            since = dt.datetime.fromisoformat(position) if position else schedule.applied_at
            return cron_slots(
                spec, since=since, now=self._clock(), num_unfinished=num_unfinished, was_crowded=was_crowded
            )
        now = time.monotonic()
        if now < self._triggers_checked_at.get(schedule.name, 0.0) + TRIGGERS_EVERY_S:
            return []
        self._triggers_checked_at[schedule.name] = now
        assert spec.trigger is not None
        found = triggers.detect(
            spec.trigger,
            self._ledger,
            position=position,
            since=schedule.applied_seq,
            is_running=is_running,
        )
        if found is None:
            return []
        return [event_slot(spec, position=found.position, reason=found.reason, is_running=is_running)]

    def _record(self, schedule: Schedule, decision: Due | Skipped) -> None:
        if isinstance(decision, Due):
            due = ScheduledRunDue(
                schedule=schedule.name,
                slot=decision.slot,
                reason=decision.reason,
                position=decision.position,
            )
            self._ledger.append_once(due, actor=ACTOR, schedule=schedule.name, slot=decision.slot)
            return
        LOG.warning("schedule %s: %d slots skipped: %s", schedule.name, decision.count, decision.reason)
        skipped = ScheduledRunSkipped(
            schedule=schedule.name,
            first=decision.first,
            last=decision.last,
            count=decision.count,
            reason=decision.reason,
            position=decision.position,
        )
        self._ledger.append(skipped, actor=ACTOR)

    def _run(self, schedule: Schedule, slot: Slot) -> None:
        """Submit the slot's job, unless it was; record its end if its process could not do this itself."""
        job = job_id(schedule.name, slot)
        is_over = self._jobs.is_over(job)
        if is_over is False:
            return
        if schedules.has_started(self._ledger, schedule.name, slot.key):
            self._finish(schedule, slot, job, state=LOST, reason=NO_RESULT)
        elif is_over is None:
            self._jobs.submit(job, schedule, slot.key)
        else:
            self._finish(schedule, slot, job, state=NOT_STARTED, reason=NO_START)

    def _finish(self, schedule: Schedule, slot: Slot, job: str, *, state: str, reason: str) -> None:
        LOG.warning("schedule %s: slot %s is %s: %s", schedule.name, slot.key, state, reason)
        finished = ScheduledRunFinished(
            schedule=schedule.name, slot=slot.key, job=job, state=state, reason=reason
        )
        self._ledger.append_once(finished, actor=ACTOR, schedule=schedule.name, slot=slot.key)


def job_id(name: str, slot: Slot) -> str:
    """Return the submission id of a slot's job. It is the same in every process."""
    digest = hashlib.sha256(f"{name}\n{slot.key}\n{slot.due_seq}".encode()).hexdigest()[:12]
    return f"schedule-{name}-{digest}"
