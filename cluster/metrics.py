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
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

BIND_TIMEOUT_S, BIND_RETRY_S = 30.0, 0.2
MAX_CONNECTIONS = 8
"""Largest number of connections at the same time. Further connections are closed at once."""
IDLE_S = 5.0
"""Timeout in seconds for a read. Every connection is closed after twice this time at the latest."""
LOG = logging.getLogger(__name__)


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
