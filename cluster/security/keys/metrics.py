"""Metrics of the key broker."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.errors import AccessDenied, Unauthenticated
from cluster.security.keys.gate import Operation

_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0)
_REFUSALS = frozenset({AccessDenied.__name__, Unauthenticated.__name__})
_OTHER = "other"


class BrokerMetrics:
    """Counts requests by operation and result, and open connections, and measures the duration of requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "falaj_broker_requests",
            "Requests to the key broker; result is ok, refused (identity or policy) or failed.",
            ["operation", "result"],
            registry=registry,
        )
        self._seconds = Histogram(
            "falaj_broker_request_seconds",
            "How long the key broker took for a request.",
            ["operation"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.refused_connections = Counter(
            "falaj_broker_connections_refused",
            "Connections that were not served: another user's, or too many at a time.",
            registry=registry,
        )
        self.connections = Gauge("falaj_broker_connections", "Connections that are open.", registry=registry)

    def measure(
        self, request: dict[str, object], answer: Callable[[dict[str, object]], dict[str, object]]
    ) -> dict[str, object]:
        """Return the answer to a request, and record its result and duration."""
        operation = str(request.get("op"))
        label = operation if operation in Operation.__members__ else _OTHER
        started = time.perf_counter()
        response = answer(request)
        self._seconds.labels(label).observe(time.perf_counter() - started)
        result = "refused" if response.get("error") in _REFUSALS else "failed"
        self._requests.labels(label, "ok" if response.get("ok") is True else result).inc()
        return response
