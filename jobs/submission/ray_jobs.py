"""Runs submitted jobs as jobs of the running Ray cluster."""

from __future__ import annotations

from jobs.ray_jobs import ProjectJobs
from jobs.submission.recorded_jobs import Job


class SubmittedJobs(ProjectJobs):
    """Jobs of one cluster; see `runner.Jobs`."""

    def submit(self, job: Job) -> None:
        """Start `jobs.submission.run_job` as a job. Nothing of the caller's text is in its command line."""
        self.start_command(
            job.id,
            ["jobs.submission.run_job", f"job={job.id}"],
            metadata={"module": job.module, "submitter": job.submitter},
        )
