"""What the supervisor counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class SupervisorMetrics:
    """Which parts run, how often each was started again, and how long a lost head took to come back."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.up = Gauge("falaj_part_up", "1 while a part of the cluster runs.", ["part"], registry=registry)
        self.restarts = Counter(
            "falaj_supervisor_restarts",
            "Parts that were started again, by what was seen of them.",
            ["part", "reason"],
            registry=registry,
        )
        self.failures = Counter(
            "falaj_supervisor_failures", "Parts that could not be started.", ["part"], registry=registry
        )
        self.recovery = Histogram(
            "falaj_supervisor_recovery_seconds",
            "From the loss of the Ray head until its applications were back.",
            buckets=(10, 20, 40, 60, 90, 120, 180, 300, 600),
            registry=registry,
        )
