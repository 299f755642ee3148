"""Run command lines as Ray jobs: start, watch, stop. The dashboard shows each job with its log."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import FalajError
from cluster.session import ClusterRecord, use_cluster

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LAST_LINE_OF_RAY = "Running entrypoint for job "
"""Text of the last line that Ray writes to a job's log before the command runs. It shows paths of the head."""
_LINES_OF_RAY = ("Runtime env is setting up.", LAST_LINE_OF_RAY)


class JobsUnavailable(FalajError):
    """Ray's job API does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobStatus:
    """What is known of a job."""

    is_over: bool
    exit_code: int | None = None
    """None while the job runs, and if its process was killed."""


class RayJobs:
    """Jobs of the running cluster. Ray starts them on the head."""

    def __init__(self, record: ClusterRecord) -> None:
        self._record = record
        self._client: JobSubmissionClient | None = None

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
        """Return the status of a job, or None if no job has this id."""
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

    def is_over(self, job: str) -> bool | None:
        """Return whether a job has ended, or None if no job has this id."""
        status = self.status(job)
        return None if status is None else status.is_over

    def log(self, job: str) -> str:
        """Return what the job has printed so far."""
        try:
            lines = str(self._connect().get_job_logs(job)).splitlines()
            return "\n".join(line for line in lines if not any(text in line for text in _LINES_OF_RAY))
        except (RuntimeError, OSError):  # the log is gone with its node
            return ""

    def stop(self, job: str) -> None:
        """End a job. It is over some seconds later."""
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


class ProjectJobs(RayJobs):
    """Jobs that run the platform's own modules in the folder of the cluster's project."""

    def start_command(self, job: str, command: Sequence[str], *, metadata: Mapping[str, str]) -> None:
        """Start `python -m <command>` as a job; see `start`."""
        self.start(job, shell_command(command, folder=self._record.project_root), metadata=metadata)


def shell_command(
    command: Sequence[str], *, folder: str | Path, variables: Mapping[str, str] | None = None
) -> str:
    """Return the shell command that runs `python -m <command>`.

    Args:
        command: Module and arguments.
        folder: Folder to run in.
        variables: Environment variables of the command.
    """
    assignments = [f"{name}={shlex.quote(value)}" for name, value in (variables or {}).items()]
    run = [*assignments, "exec", shlex.join([sys.executable, "-m", *command])]
    return f"cd {shlex.quote(str(folder))} && {' '.join(run)}"


def current_job() -> str:
    """Return the submission id of the Ray job that this process is; "" outside a job."""
    return os.environ.get("RAY_JOB_SUBMISSION_ID", "")
