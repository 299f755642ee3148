"""Prometheus endpoint of the cluster's own processes, on loopback. Ray's actors use `ray.util.metrics` instead.

Metrics contain counts and times. They never contain the name of a principal or a key, because every user of this
machine can read metrics. The number of connections and their duration are limited, because a process such as the key
broker needs its file descriptors and threads for its own work.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Collection
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)

from cluster.errors import AccessDenied, Unauthenticated

BIND_TIMEOUT_S, BIND_RETRY_S = 30.0, 0.2
MAX_CONNECTIONS = 8
"""Largest number of connections at the same time. Further connections are closed at once."""
IDLE_S = 5.0
"""Timeout in seconds for a read. Every connection is closed after twice this time at the latest."""
LOG = logging.getLogger(__name__)
_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0)
_REFUSALS = frozenset({AccessDenied.__name__, Unauthenticated.__name__})
_OTHER = "other"

Request = dict[str, object]


def new_registry() -> CollectorRegistry:
    """Return a registry with the standard metrics of this process: start time, CPU, memory, file descriptors."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter, with the time of its creation
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def success_gauge(registry: CollectorRegistry, *, prefix: str, of: str) -> Gauge:
    """Register `<prefix>_last_success_timestamp_seconds`, which each process has, and return it.

    Args:
        registry: Where the metric is registered.
        prefix: First part of the metric's name, such as `falaj_broker`.
        of: What succeeds, for the description.
    """
    return Gauge(
        f"{prefix}_last_success_timestamp_seconds",
        f"Unix time of the last {of}; 0 if there was none.",
        registry=registry,
    )


class RequestMetrics:
    """Requests to a process by operation and result, their durations, open and refused connections, last success.

    Args:
        registry: Where the metrics are registered.
        prefix: First part of the metrics' names, such as `falaj_broker`.
        process: Name of the process, for descriptions.
        operations: Names of the known operations. All others count as one, because clients choose them.
    """

    def __init__(
        self, registry: CollectorRegistry, *, prefix: str, process: str, operations: Collection[str]
    ) -> None:
        self._operations = frozenset(operations)
        self._requests = Counter(
            f"{prefix}_requests",
            f"Requests to the {process}; result is ok, refused (identity or policy) or failed.",
            ["operation", "result"],
            registry=registry,
        )
        self._seconds = Histogram(
            f"{prefix}_request_seconds",
            f"How long the {process} took for a request.",
            ["operation"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._last_success = success_gauge(
            registry, prefix=prefix, of=f"request that the {process} answered with ok"
        )
        self.refused_connections = Counter(
            f"{prefix}_connections_refused",
            f"Connections that the {process} did not serve: not permitted, or too many at a time.",
            registry=registry,
        )
        self.connections = Gauge(
            f"{prefix}_connections", f"Open connections of the {process}.", registry=registry
        )

    def measure(self, request: Request, answer: Callable[[Request], Request]) -> Request:
        """Return the answer to a request, and record its result and duration."""
        operation = str(request.get("op"))
        label = operation if operation in self._operations else _OTHER
        started = time.perf_counter()
        response = answer(request)
        self._seconds.labels(label).observe(time.perf_counter() - started)
        if response.get("ok") is True:
            self._last_success.set_to_current_time()
            result = "ok"
        else:
            result = "refused" if response.get("error") in _REFUSALS else "failed"
        self._requests.labels(label, result).inc()
        return response


def serve_metrics(registry: CollectorRegistry, *, port: int | None) -> None:
    """Serve GET /metrics on a port of 127.0.0.1, in a background thread.

    The previous process may still use the port for a moment, so binding is retried for `BIND_TIMEOUT_S` seconds. If
    the port stays in use, a warning is logged and no metrics are served. With `port=None` nothing is served: cluster
    records of earlier releases have no metrics port.
    """
    if port is not None:
        threading.Thread(target=_serve, args=(registry, port), name="metrics", daemon=True).start()


def _serve(registry: CollectorRegistry, port: int) -> None:
    deadline = time.monotonic() + BIND_TIMEOUT_S
    while True:
        try:
            server = make_server("127.0.0.1", port, make_wsgi_app(registry), _Server, _Handler)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                LOG.warning("no metrics are served, because port %d cannot be used: %s", port, error.strerror)
                return
        time.sleep(BIND_RETRY_S)
    server.serve_forever()


class _Handler(WSGIRequestHandler):
    """Request handler without an access log and with a read timeout."""

    timeout = IDLE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """Server with one thread for each connection, up to `MAX_CONNECTIONS`."""

    daemon_threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a new thread, or close the connection if there are too many connections."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._slots.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer within 2 * `IDLE_S` seconds, then let another connection start."""
        timer = threading.Timer(2 * IDLE_S, _shut_down, args=(request,))
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing for a client that disconnected or sent an invalid request."""


def _shut_down(request: socket.socket) -> None:
    """Shut down a connection, even if the client keeps sending single bytes."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
