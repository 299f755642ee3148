"""Prometheus metrics of the controller. `time() - …_last_success_timestamp_seconds` is the age of the last success."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from cluster.metrics import success_gauge


class ControllerMetrics:
    """Whether the controller works, whether it is the one that acts, and how many rollouts it cannot judge."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.last_check = success_gauge(
            registry,
            prefix="falaj_rollouts",
            of="look at all rollouts, or check that another controller acts",
        )
        self.acts = Gauge(
            "falaj_rollouts_controller_acts",
            "1 if this controller acts, 0 if another one does.",
            registry=registry,
        )
        self.journaled = Gauge(
            "falaj_rollouts_journaled_rollbacks",
            "Rollbacks in this machine's journal that are not in the ledger yet.",
            registry=registry,
        )
        self.not_judged = Gauge(
            "falaj_rollouts_not_judged",
            "Rollouts with a policy that could not be judged at the last look.",
            registry=registry,
        )
