"""Metrics of the edge's controller and of its reader of access records.

HAProxy has its own metrics of requests and latency, at the port `edge_metrics`.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.metrics import success_gauge
from serve_apps.rollout.evidence.collecting import Collected


class EdgeMetrics:
    """The last applied event, and the results of the controller's steps."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.applied_seq = Gauge(
            "falaj_edge_applied_seq", "Last event of the ledger that was applied.", registry=registry
        )
        self.last_step = Gauge(
            "falaj_edge_last_step_timestamp_seconds",
            "Unix time of the controller's last step.",
            registry=registry,
        )
        self.last_success = success_gauge(
            registry, prefix="falaj_edge", of="step of the controller without an error"
        )
        self.step_seconds = Histogram(
            "falaj_edge_step_seconds",
            "Duration of a step: reading the ledger and Serve, and applying what changed.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0),
            registry=registry,
        )
        self.failed_steps = Counter(
            "falaj_edge_failed_steps", "Steps whose changes could not be applied.", registry=registry
        )
        self.loads = Counter(
            "falaj_edge_loads",
            "Configurations given to HAProxy; result is ok or refused.",
            ["result"],
            registry=registry,
        )
        self.revivals = Counter(
            "falaj_edge_haproxy_restarts", "Restarts of HAProxy after it died.", registry=registry
        )
        self.access_records = Counter(
            "falaj_edge_access_records",
            "Lines of access files that were read; result is ok or broken.",
            ["result"],
            registry=registry,
        )
        self.unread_bytes = Gauge(
            "falaj_edge_unread_access_bytes",
            "Bytes of access files that the last pass left for the next one.",
            registry=registry,
        )
        self.last_count = Gauge(
            "falaj_edge_last_count_timestamp_seconds",
            "Unix time at which access records were last counted without an error.",
            registry=registry,
        )

    def count(self, collected: Collected) -> None:
        """Add the result of a pass over access files."""
        self.access_records.labels("broken").inc(collected.broken)
        self.access_records.labels("ok").inc(collected.records)
        self.unread_bytes.set(collected.behind_bytes)
        self.last_count.set_to_current_time()
