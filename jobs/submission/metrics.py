"""Prometheus metrics of the service for submitted jobs."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.metrics import success_gauge


class JobMetrics:
    """Requests by operation and status, their durations, unfinished jobs, and the last check of all jobs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "falaj_jobs_requests",
            "Requests about submitted jobs; code is the HTTP status.",
            ["operation", "code"],
            registry=registry,
        )
        self.seconds = Histogram(
            "falaj_jobs_request_seconds",
            "How long the job service took for a request, without the time that a log is followed.",
            ["operation"],
            registry=registry,
        )
        self._unfinished = Gauge(
            "falaj_jobs_unfinished", "Submitted jobs that are not finished.", registry=registry
        )
        self.last_check = success_gauge(
            registry, prefix="falaj_jobs", of="check of all unfinished jobs without an error"
        )

    def count_unfinished(self, count: Callable[[], int]) -> None:
        """Show the number that a function returns."""
        self._unfinished.set_function(count)
