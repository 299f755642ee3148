"""Run command lines as Ray jobs: submit, watch, stop. The dashboard shows each job with its log."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from cluster.entrypoint import RESULT_VARIABLE
from cluster.errors import FalajError
from cluster.security.tokens.intent import FILE_VARIABLE
from cluster.session import ClusterRecord, use_cluster

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

T = TypeVar("T")
_PASSED_ON = (FILE_VARIABLE, "PYTHONPATH")
"""Variables of the caller that a job gets. They are paths; the dashboard shows them."""
_RAYS_OWN = ("Runtime env is setting up.", "Running entrypoint for job ")
"""Texts of the lines with which Ray starts the log of a job."""
PATIENCE_S = 120.0
"""How long a call waits for Ray's job API, for example while the supervisor restarts Ray's head."""
PAUSE_S = 0.5
"""How long to wait before a call is repeated, and before the state of a stopped job is read again."""


class JobsUnavailable(FalajError):
    """Ray's job API does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """What is known of a job."""

    is_over: bool
    exit_code: int | None = None
    """None while the job runs, and if its process was killed."""


class Jobs(Protocol):
    """Runs command lines. `RayJobs` is the real one; tests have their own."""

    def submit(self, job: str, command: Sequence[str], *, result: Path, metadata: Mapping[str, str]) -> None:
        """Start `python -m <command>` under a submission id. A job with this id must not exist."""

    def status(self, job: str) -> JobStatus | None:
        """Return the status of a job, or None if no job has this id."""

    def log(self, job: str) -> str:
        """Return what the job has printed so far."""

    def stop(self, job: str) -> None:
        """End a job. It is over some seconds later."""


class RayJobs:
    """Jobs of the running cluster."""

    def __init__(self, record: ClusterRecord) -> None:
        self._record = record
        self._client: JobSubmissionClient | None = None

    def submit(self, job: str, command: Sequence[str], *, result: Path, metadata: Mapping[str, str]) -> None:
        """Start a job in the current folder. Ray starts it on the head, which is this machine."""
        self.start(job, entrypoint(command, folder=Path.cwd(), result=result), metadata=metadata)

    def start(self, job: str, shell_command: str, *, metadata: Mapping[str, str]) -> None:
        """Start a shell command as a job.

        Args:
            job: Submission id. A job with this id must not exist.
            shell_command: The command.
            metadata: Shown on the dashboard.

        Raises:
            JobsUnavailable: The job API does not answer, or there is such a job.
        """
        try:
            self._connect().submit_job(submission_id=job, entrypoint=shell_command, metadata=dict(metadata))
        except (RuntimeError, OSError) as error:
            raise JobsUnavailable(f"Ray's job API did not take job {job}: {error}") from error

    def status(self, job: str) -> JobStatus | None:
        try:
            details = self._connect().get_job_info(job)
        except (RuntimeError, OSError) as error:
            if "status code 404" in str(error):
                return None
            raise JobsUnavailable(f"Ray's job API does not answer: {error}") from error
        code = details.driver_exit_code
        return JobStatus(
            is_over=details.status.is_terminal(),
            exit_code=None if code is None else int(code),
        )

    def log(self, job: str) -> str:
        try:
            lines = str(self._connect().get_job_logs(job)).splitlines()
            return "\n".join(line for line in lines if not any(text in line for text in _RAYS_OWN))
        except (RuntimeError, OSError):  # the log is gone with its node
            return ""

    def stop(self, job: str) -> None:
        try:
            self._connect().stop_job(job)
        except (RuntimeError, OSError) as error:
            if "status code 404" not in str(error):
                raise JobsUnavailable(f"Ray's job API did not end job {job}: {error}") from error

    def _connect(self) -> JobSubmissionClient:
        if self._client is None:
            use_cluster(self._record)
            # Ray's import takes more than a second, and a run that has nothing to do needs no job.
            from ray.job_submission import JobSubmissionClient

            try:
                self._client = JobSubmissionClient(self._record.dashboard_url)
            except OSError as error:  # ConnectionError, or that of `requests`
                raise JobsUnavailable(
                    f"Ray's job API does not answer at {self._record.dashboard_url}. `python -m cluster.status` shows "
                    "whether the dashboard is dead."
                ) from error
        return self._client


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
    variables = {RESULT_VARIABLE: str(result)} | {
        name: os.environ[name] for name in _PASSED_ON if name in os.environ
    }
    assignments = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    return (
        f"cd {shlex.quote(str(folder))} && {assignments} exec {shlex.join([sys.executable, '-m', *command])}"
    )
