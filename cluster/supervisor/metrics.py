"""Prometheus metrics of the supervisor."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.metrics import success_gauge


class SupervisorMetrics:
    """State and restarts of each part, and the recovery time of a lost head."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.up = Gauge("falaj_part_up", "1 while a part of the cluster runs.", ["part"], registry=registry)
        self.restarts = Counter(
            "falaj_supervisor_restarts",
            "Restarts of parts, by the state that caused them.",
            ["part", "reason"],
            registry=registry,
        )
        self.failures = Counter(
            "falaj_supervisor_failures", "Parts that could not be started.", ["part"], registry=registry
        )
        self.last_success = success_gauge(registry, prefix="falaj_supervisor", of="check of all parts")
        self.recovery = Histogram(
            "falaj_supervisor_recovery_seconds",
            "Seconds from the loss of the Ray head until its applications were restored.",
            buckets=(10, 20, 40, 60, 90, 120, 180, 300, 600),
            registry=registry,
        )
