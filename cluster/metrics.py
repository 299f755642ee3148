"""Prometheus metrics of the cluster's own processes, on loopback; Ray's actors use `ray.util.metrics` instead.

They hold counts and times, never a name of a principal or a key. Every user of this machine may read them. So nobody
may hold a connection for long, or many: the broker, say, needs its file descriptors and threads for its own work.
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

TRY_S, AGAIN_S = 30.0, 0.2
MAX_CONNECTIONS = 8
"""At a time; those beyond are closed at once."""
IDLE_S = 5.0
"""How long a connection may say nothing."""
LOG = logging.getLogger(__name__)


def serve_metrics(registry: CollectorRegistry, *, port: int | None) -> None:
    """Answer GET /metrics on a port of 127.0.0.1, in a thread.

    The process before this one may still be at that port for a moment. If it stays taken, that is logged, and the
    process does its work without metrics. A record of an earlier release names no port, and then nothing is served.
    """
    if port is not None:
        threading.Thread(target=_serve, args=(registry, port), name="metrics", daemon=True).start()


def _serve(registry: CollectorRegistry, port: int) -> None:
    deadline = time.monotonic() + TRY_S
    while True:
        try:
            server = make_server("127.0.0.1", port, make_wsgi_app(registry), _Server, _Handler)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                LOG.warning("no metrics are served, because port %d cannot be used: %s", port, error.strerror)
                return
        time.sleep(AGAIN_S)
    server.serve_forever()


class _Handler(WSGIRequestHandler):
    """Says nothing of each request, and does not wait for one that does not come."""

    timeout = IDLE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each of a few connections."""

    daemon_threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if one is free."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self._slots.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and free the thread."""
        timer = threading.Timer(2 * IDLE_S, _cut, args=(request,))
        timer.daemon = True
        timer.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone, or that sends nonsense, is nothing to tell of."""


def _cut(request: socket.socket) -> None:
    """End a connection that sends a byte now and then."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
