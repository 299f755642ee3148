"""Tests that scrapers cannot block a process of the cluster."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Counter

from cluster import metrics
from tests.servers.ports import free_port


def _scrape(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return bytes(response.read())


def _scrape_when_ready(port: int, *, until_s: float = 10.0) -> bytes:
    """Return the metrics as soon as the server answers."""
    deadline = time.monotonic() + until_s
    while True:
        try:
            return _scrape(port)
        except OSError:
            assert time.monotonic() < deadline
        time.sleep(0.05)


def test_idle_connections_are_limited_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any user can open them. They are few, they end soon, and then metrics can be read again."""
    monkeypatch.setattr(metrics._Handler, "timeout", 1.0)
    port, registry = free_port(), CollectorRegistry()
    Counter("canary", "A metric.", registry=registry)
    metrics.serve_metrics(registry, port=port)
    assert b"canary_total 0.0" in _scrape_when_ready(port)
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(3 * metrics.MAX_CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        num_threads = threading.active_count() - before
        assert num_threads <= 2 * metrics.MAX_CONNECTIONS  # each with its timer
        assert b"canary_total" in _scrape_when_ready(port)
