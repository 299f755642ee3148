"""Runs slots as jobs of the running Ray cluster."""

from __future__ import annotations

import shlex
import sys

from cluster.session import ClusterRecord
from jobs.pipeline.stage.ray_jobs import RayJobs
from jobs.schedule.schedules import Schedule


class SlotJobs:
    """Jobs of one cluster; see `scheduler.Jobs`."""

    def __init__(self, record: ClusterRecord) -> None:
        self._jobs = RayJobs(record)
        self._root = record.project_root

    def submit(self, job: str, schedule: Schedule, slot: str) -> None:
        """Start `jobs.schedule.run_slot` as a job."""
        command = [sys.executable, "-m", "jobs.schedule.run_slot", f"name={schedule.name}", f"slot='{slot}'"]
        self._jobs.start(
            job,
            f"cd {shlex.quote(self._root)} && exec {shlex.join(command)}",
            metadata={"schedule": schedule.name, "slot": slot},
        )

    def is_over(self, job: str) -> bool | None:
        """Return whether a job has ended, or None if no job has this id."""
        status = self._jobs.status(job)
        return None if status is None else status.is_over
