"""Run stages as Ray jobs, also while the supervisor restarts Ray's head."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from cluster.entrypoint import RESULT_VARIABLE
from cluster.security.tokens.intent import FILE_VARIABLE
from jobs.ray_jobs import JobStatus, JobsUnavailable, RayJobs, shell_command

T = TypeVar("T")
_PASSED_ON = (FILE_VARIABLE, "PYTHONPATH")
"""Variables of the caller that a job gets. They are paths; the dashboard shows them."""
PATIENCE_S = 120.0
"""How long a call waits for Ray's job API, for example while the supervisor restarts Ray's head."""
PAUSE_S = 0.5
"""How long to wait before a call is repeated, and before the state of a stopped job is read again."""


class Jobs(Protocol):
    """Runs command lines. `StageJobs` is the real one; tests have their own."""

    def submit(self, job: str, command: Sequence[str], *, result: Path, metadata: Mapping[str, str]) -> None:
        """Start `python -m <command>` under a submission id. A job with this id must not exist."""

    def status(self, job: str) -> JobStatus | None:
        """Return the status of a job, or None if no job has this id."""

    def log(self, job: str) -> str:
        """Return what the job has printed so far."""

    def stop(self, job: str) -> None:
        """End a job. It is over some seconds later."""


class StageJobs(RayJobs):
    """Stages as jobs of the running cluster."""

    def submit(self, job: str, command: Sequence[str], *, result: Path, metadata: Mapping[str, str]) -> None:
        """Start a job in the current folder. Ray starts it on the head, which is this machine."""
        self.start(job, entrypoint(command, folder=Path.cwd(), result=result), metadata=metadata)


class PatientJobs:
    """Jobs of a cluster whose head may be restarted: a call is repeated while Ray's job API does not answer."""

    def __init__(self, jobs: Jobs, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._jobs = jobs
        self._sleep = sleep

    def submit(self, job: str, command: Sequence[str], *, result: Path, metadata: Mapping[str, str]) -> None:
        """Start a job. If an earlier try has started it although its answer was lost, do nothing."""

        def submit_new() -> None:
            if self._jobs.status(job) is None:
                self._jobs.submit(job, command, result=result, metadata=metadata)

        self._repeat(submit_new)

    def status(self, job: str) -> JobStatus | None:
        return self._repeat(lambda: self._jobs.status(job))

    def log(self, job: str) -> str:
        return self._jobs.log(job)

    def stop(self, job: str) -> None:
        self._repeat(lambda: self._jobs.stop(job))

    def _repeat(self, call: Callable[[], T]) -> T:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except JobsUnavailable:
                if time.monotonic() > deadline:
                    raise
                self._sleep(PAUSE_S)


def end_job(jobs: Jobs, job: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Stop a job, and wait until it is over."""
    jobs.stop(job)
    while (status := jobs.status(job)) is not None and not status.is_over:
        sleep(PAUSE_S)


def entrypoint(command: Sequence[str], *, folder: Path, result: Path) -> str:
    """Return the shell command of a job.

    Args:
        command: Module and arguments.
        folder: Folder to run in.
        result: File for the command's result.
    """
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return shell_command(command, folder=folder, variables={RESULT_VARIABLE: str(result)} | passed_on)
