"""Metrics of the key broker."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from cluster.metrics import RequestMetrics
from cluster.security.keys.gate import Operation


class BrokerMetrics(RequestMetrics):
    """Requests for keys. A request of a relay counts by the operation that it passes on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        operations = Operation.__members__
        super().__init__(registry, prefix="falaj_broker", process="key broker", operations=operations)
