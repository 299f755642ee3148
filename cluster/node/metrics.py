"""Prometheus metrics of the cluster's own processes, on loopback; Ray's actors use `ray.util.metrics` instead.

They hold counts and times, never a name of a principal or a key.
"""

from __future__ import annotations

import logging
import threading
import time

from prometheus_client import CollectorRegistry, start_http_server

TRY_S, AGAIN_S = 30.0, 0.2
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
            start_http_server(port, addr="127.0.0.1", registry=registry)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                LOG.warning("no metrics are served, because port %d cannot be used: %s", port, error.strerror)
                return
        time.sleep(AGAIN_S)
