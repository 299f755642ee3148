"""Runs submitted jobs as jobs of the running Ray cluster."""

from __future__ import annotations

import shlex
import sys

from cluster.session import ClusterRecord
from jobs.pipeline.stage.ray_jobs import RayJobs
from jobs.submission.submitted import Job


class SubmittedJobs:
    """Jobs of one cluster; see `runner.Jobs`."""

    def __init__(self, record: ClusterRecord) -> None:
        self._jobs = RayJobs(record)
        self._root = record.project_root

    def submit(self, job: Job) -> None:
        """Start `jobs.submission.run_job` as a job. Nothing of the caller's text is in its command line."""
        command = [sys.executable, "-m", "jobs.submission.run_job", f"job={job.id}"]
        self._jobs.start(
            job.id,
            f"cd {shlex.quote(self._root)} && exec {shlex.join(command)}",
            metadata={"module": job.module, "submitter": job.submitter},
        )

    def is_over(self, job: str) -> bool | None:
        """Return whether a job has ended, or None if no job has this id."""
        status = self._jobs.status(job)
        return None if status is None else status.is_over

    def stop(self, job: str) -> None:
        """End a job."""
        self._jobs.stop(job)
