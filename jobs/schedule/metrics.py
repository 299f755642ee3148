"""Prometheus metrics of the scheduler, and of the newest monitoring runs, which end before they could be scraped.

`time() - …_last_success_timestamp_seconds` is the age of the last success.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from cluster.ledger import Ledger
from cluster.ledger.events import ModelMonitored
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


class MonitorMetrics:
    """Figures of the newest monitoring run of each model, variant and version.

    They come from the events in the ledger. A version that is not monitored any more keeps its last figures; compare
    `falaj_monitor_last_success_timestamp_seconds`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._read_at = 0
        labels = ["model", "variant", "version"]
        self._last_run = Gauge(
            "falaj_monitor_last_success_timestamp_seconds",
            "Unix time of the last monitoring of a version.",
            labels,
            registry=registry,
        )
        self._performance = Gauge(
            "falaj_monitor_performance",
            "Performance in the newest period that has it; kind is estimated or realised.",
            [*labels, "metric", "kind"],
            registry=registry,
        )
        self._alerts = Gauge(
            "falaj_monitor_alerts",
            "Number of alerts in all periods; kind is drift, missing, unseen, reconstruction, performance or traffic.",
            [*labels, "kind"],
            registry=registry,
        )

    def follow(self, ledger: Ledger) -> None:
        """Set the figures of the monitoring runs since the last call. The first call reads all events of this type."""
        head = ledger.head()
        if head == self._read_at:
            return
        for entry in ledger.entries(ModelMonitored, after=self._read_at):
            self.show(entry.payload, time=dt.datetime.fromisoformat(entry.time))
        self._read_at = head

    def show(self, event: Mapping[str, Any], *, time: dt.datetime) -> None:
        """Set the figures of one monitored version.

        Args:
            event: Payload of a `ModelMonitored` event.
            time: Time of the event.
        """
        labels = (event["model"], event["variant"], str(event["version"]))
        self._last_run.labels(*labels).set(time.timestamp())
        periods = [period for _, period in sorted(event["periods"].items())]
        for period in periods:  # a later period replaces the figure of an earlier one
            for name, value in period.items():
                kind, _, metric = name.partition("_")
                if kind in ("estimated", "realised") and value is not None:
                    self._performance.labels(*labels, metric, kind).set(value)
        counts = {
            kind: sum(map(len, event.get(kind, {}).values()))
            for kind in ("drift", "missing", "unseen", "traffic")
        }
        counts["reconstruction"] = len(event.get("reconstruction", ()))
        counts["performance"] = sum(
            bool((period.get(name) or {}).get("alert"))
            for period in periods
            for name in ("estimate", "realisation")
        )
        for kind, count in counts.items():
            self._alerts.labels(*labels, kind).set(count)
