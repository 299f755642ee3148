"""Who may hold up a process of the cluster by its metrics: nobody."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Counter

from cluster import metrics
from tests.ports import free_port


def _scraped(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return bytes(response.read())


def _waited_for(port: int, *, until_s: float = 10.0) -> bytes:
    """What the server says as soon as it says something."""
    deadline = time.monotonic() + until_s
    while True:
        try:
            return _scraped(port)
        except OSError:
            assert time.monotonic() < deadline
        time.sleep(0.05)


def test_connections_that_ask_nothing_take_no_more_than_a_few_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any user of the machine may open them; they are few, they end soon, and then metrics are read again."""
    monkeypatch.setattr(metrics._Handler, "timeout", 1.0)
    port, registry = free_port(), CollectorRegistry()
    Counter("canary", "A metric.", registry=registry)
    metrics.serve_metrics(registry, port=port)
    assert b"canary_total 0.0" in _waited_for(port)
    before = threading.active_count()
    with ExitStack() as stack:
        for _ in range(3 * metrics.MAX_CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        held = threading.active_count() - before
        assert held <= 2 * metrics.MAX_CONNECTIONS  # each with its timer
        assert b"canary_total" in _waited_for(port)
