"""Starts, stops and ends submitted jobs as Ray jobs.

Its only state is the ledger. A job has the event `JobSubmitted` before it is started, and its process appends
`JobStarted` before it runs the command. Each of these events is appended once, so a service that is killed at any
moment neither loses a job nor runs it twice.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.errors import FalajError, RefusedError, first_line
from cluster.ledger import Ledger
from cluster.ledger.events import JobFinished
from cluster.ledger.store import utc_now
from jobs.command_states import LOST, NO_RESULT, NO_START, NOT_STARTED, STOPPED
from jobs.submission import recorded_jobs
from jobs.submission.recorded_jobs import Job

ACTOR = "system:jobs"
CHECK_S = 3.0
"""Seconds after which a running job is checked again."""
AFTER_ERROR_S = 10.0
"""Seconds until a job is checked again after an error, for example while Ray's job API does not answer."""
MAX_WAIT = dt.timedelta(hours=1)
"""A job that could not be started for this time is not started later, because its caller's rights may have ended."""
LOG = logging.getLogger("falaj.jobs")


class Jobs(Protocol):
    """Runs submitted jobs. `ray_jobs.SubmittedJobs` is the real one; tests have their own."""

    def submit(self, job: Job) -> None:
        """Start a job's process under its id. If there is a job with this id, do nothing."""

    def is_over(self, job: str) -> bool | None:
        """Return whether a job has ended, or None if no job has this id."""

    def stop(self, job: str) -> None:
        """End a job. It is over some seconds later."""


@dataclass(slots=True)
class _Watched:
    job: Job
    check_at: float = 0.0
    """Monotonic seconds."""


class JobRunner:
    """Runs the jobs of one ledger. It is thread-safe.

    Args:
        ledger: the ledger.
        jobs: starts and stops jobs.
        intents: folder with the intents that callers sent, one file for each job.
        max_running: how many jobs run at the same time at most.
        clock: returns the present time, in UTC.
    """

    def __init__(
        self,
        ledger: Ledger,
        jobs: Jobs,
        *,
        intents: Path,
        max_running: int,
        clock: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        self._ledger = ledger
        self._jobs = jobs
        self._intents = intents
        self._max_running = max_running
        self._clock = clock
        self._running: set[str] = set()
        self._lock = threading.Lock()
        self._watched = {job.id: _Watched(job) for job in recorded_jobs.unfinished_jobs(ledger)}

    def watch(self, job: Job) -> None:
        """Check a new or a stopped job at once."""
        with self._lock:
            self._watched[job.id] = _Watched(job)

    def unfinished(self) -> list[Job]:
        """Return the jobs that are not finished."""
        with self._lock:
            return [watched.job for watched in self._watched.values()]

    def check_once(self) -> bool:
        """Check every job that is due, and return whether there was no error.

        An error of one job does not stop the others.
        """
        with self._lock:
            due = [watched for watched in self._watched.values() if watched.check_at <= time.monotonic()]
        is_healthy = True
        for watched in due:
            wait_s = CHECK_S
            try:
                is_over = self._check(watched.job)
            except (FalajError, RefusedError, OSError) as error:
                LOG.warning("job %s: %s", watched.job.id, first_line(error))
                is_over, is_healthy, wait_s = False, False, AFTER_ERROR_S
            watched.check_at = time.monotonic() + wait_s
            if is_over:
                self._forget(watched)
        return is_healthy

    def _check(self, job: Job) -> bool:
        """Do what is next for a job, and return whether it is over."""
        is_over = self._jobs.is_over(job.id)
        (self._running.add if is_over is False else self._running.discard)(job.id)
        # The ledger is read after that, because a job records its end before it is over.
        if recorded_jobs.state_of(self._ledger, job.id).is_over:
            return True
        is_stopped = recorded_jobs.is_stopped(self._ledger, job.id)
        if is_over is False:
            if is_stopped:
                self._jobs.stop(job.id)
            return False
        if recorded_jobs.has_started(self._ledger, job.id):
            reason = "stopped by command" if is_stopped else NO_RESULT
            return self._finish(job, STOPPED if is_stopped else LOST, reason)
        if is_stopped:
            return self._finish(job, STOPPED, "stopped before its start")
        if is_over:
            return self._finish(job, NOT_STARTED, NO_START)
        if self._clock() - job.submitted_at > MAX_WAIT:
            return self._finish(job, NOT_STARTED, "it could not be started within an hour")
        if len(self._running) < self._max_running:
            self._jobs.submit(job)
            self._running.add(job.id)
        return False

    def _finish(self, job: Job, state: str, reason: str) -> bool:
        LOG.warning("job %s is %s: %s", job.id, state, reason)
        finished = JobFinished(job=job.id, state=state, reason=reason)
        self._ledger.append_once(finished, actor=ACTOR, job=job.id)
        return True

    def _forget(self, watched: _Watched) -> None:
        with self._lock:
            self._watched.pop(watched.job.id, None)
        with contextlib.suppress(OSError):
            (self._intents / intent_name(watched.job.id)).unlink()


def intent_name(job: str) -> str:
    """Return the name of the file with a job's intent."""
    return f"{job}.jwt"
