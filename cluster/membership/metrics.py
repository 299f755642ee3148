"""Metrics of the head's service for nodes."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge

from cluster.metrics import RequestMetrics

OPERATIONS = (
    "deposit",
    "intent",
    "join",
    "jwks",
    "key",
    "leave",
    "nodes",
    "renew",
    "report",
    "service_token",
    "withdraw",
)


class NodeMetrics(RequestMetrics):
    """Requests of nodes, and the number of nodes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(
            registry, prefix="falaj_nodes", process="head's service for nodes", operations=OPERATIONS
        )
        self._members = Gauge(
            "falaj_nodes_members", "Nodes that joined and have not left, without the head.", registry=registry
        )
        self._alive = Gauge("falaj_nodes_alive", "Nodes among them that report.", registry=registry)

    def count_nodes(self, *, alive: Callable[[], int], members: Callable[[], int]) -> None:
        """Call these functions at each scrape to count the nodes."""
        self._alive.set_function(alive)
        self._members.set_function(members)
