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
        self.webhook_waiting = Gauge(
            "falaj_rollouts_webhook_waiting",
            "Events that the webhook's receiver has not taken yet.",
            registry=registry,
        )
        self.out_of_bounds = Gauge(
            "falaj_rollouts_quality_out_of_bounds",
            "1 if monitoring says that a version that serves is out of its bounds, 0 if it is not any more.",
            ["model", "version"],
            registry=registry,
        )
        self.not_judged = Gauge(
            "falaj_rollouts_not_judged",
            "Rollouts with a policy that could not be judged at the last look.",
            registry=registry,
        )
