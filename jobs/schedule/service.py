"""`python -m jobs.schedule.service`: the scheduler. `cluster.up` starts it, and the supervisor keeps it alive.

Each cluster has one scheduler, on the head. A lock prevents a second one.
"""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

import sqlalchemy as sa

from cluster.entrypoint import job
from cluster.errors import FalajError, RefusedError, first_line
from cluster.host.processes import exit_at_once
from cluster.host.signals import set_on_signal
from cluster.ledger import Ledger, open_ledger
from cluster.metrics import new_registry, serve_metrics
from cluster.node.locks import hold_lock
from cluster.node.scheduling import wait_for_turn
from cluster.session import record_path, require_recorded_cluster
from cluster.settings import PlatformConfig
from jobs.schedule.metrics import MonitorMetrics, SchedulerMetrics
from jobs.schedule.ray_jobs import SlotJobs
from jobs.schedule.scheduler import Scheduler

EVERY_S = 1.0
LOG = logging.getLogger("falaj.scheduler")


@job("cluster", PlatformConfig)
def main(config: PlatformConfig) -> None:
    """Run schedules until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    wait_for_turn()
    record, stopped = require_recorded_cluster(config), threading.Event()
    set_on_signal([signal.SIGTERM], stopped)
    registry = new_registry()
    metrics, monitored = SchedulerMetrics(registry), MonitorMetrics(registry)
    serve_metrics(registry, port=record.ports.get("scheduler_metrics"))
    refusal = "Another scheduler (pid {pid}) runs for {folder}. `python -m cluster.status` shows it."
    with hold_lock(Path(record_path(config.storage)).with_name("scheduler.lock"), refusal):
        ledger: Ledger | None = None
        scheduler = None
        while not stopped.wait(EVERY_S):
            try:
                ledger = ledger or open_ledger(config)
                scheduler = scheduler or Scheduler(ledger, SlotJobs(record), metrics=metrics)
                scheduler.check_once()
                monitored.follow(ledger)
            except (sa.exc.SQLAlchemyError, FalajError, RefusedError, OSError) as error:
                LOG.warning("the schedules could not be read: %s", first_line(error))
    exit_at_once()  # a thread of Ray's client may wait


if __name__ == "__main__":
    main()
