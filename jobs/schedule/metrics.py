"""Prometheus metrics of the scheduler. `time() - …_last_success_timestamp_seconds` is the age of the last success."""

from __future__ import annotations

import datetime as dt

from prometheus_client import CollectorRegistry, Gauge

from cluster.metrics import success_gauge


class SchedulerMetrics:
    """Whether the scheduler works, and the last success and the waiting slots of each schedule."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.last_check = success_gauge(
            registry, prefix="falaj_scheduler", of="check of all schedules without an error"
        )
        self._last_run = Gauge(
            "falaj_schedule_last_success_timestamp_seconds",
            "Unix time at which a schedule's last successful run ended.",
            ["schedule"],
            registry=registry,
        )
        self._waiting = Gauge(
            "falaj_schedule_unfinished_slots",
            "Slots of a schedule that are due and not finished.",
            ["schedule"],
            registry=registry,
        )

    def show(self, schedule: str, *, last_success: dt.datetime | None, unfinished: int) -> None:
        """Set the figures of one schedule."""
        if last_success is not None:
            self._last_run.labels(schedule).set(last_success.timestamp())
        self._waiting.labels(schedule).set(unfinished)

    def clear(self) -> None:
        """Forget all schedules, because some may have been removed."""
        self._last_run.clear()
        self._waiting.clear()
