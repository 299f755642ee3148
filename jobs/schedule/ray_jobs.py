"""Runs slots as jobs of the running Ray cluster."""

from __future__ import annotations

from jobs.ray_jobs import ProjectJobs
from jobs.schedule.schedules import Schedule


class SlotJobs(ProjectJobs):
    """Jobs of one cluster; see `scheduler.Jobs`."""

    def submit(self, job: str, schedule: Schedule, slot: str) -> None:
        """Start `jobs.schedule.run_slot` as a job."""
        self.start_command(
            job,
            ["jobs.schedule.run_slot", f"name={schedule.name}", f"slot='{slot}'"],
            metadata={"schedule": schedule.name, "slot": slot},
        )
