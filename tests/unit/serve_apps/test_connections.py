"""Clients that take connections and give nothing for them."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import replace

import pytest

from serve_apps.edge.config import render
from tests.edge import ROLLOUT, Edge, wait_until


def begun(edge: Edge, data: bytes) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", edge.port), timeout=10)
    connection = edge.context.wrap_socket(plain, server_hostname="127.0.0.1")
    connection.sendall(data)
    return connection


def test_one_address_cannot_take_all_connections(edge: Edge) -> None:
    """What it has too many of is closed at once; when one ends, another may come."""
    before = edge.settings
    edge.settings = replace(before, max_connections_of_one_address=5)
    edge.load(ROLLOUT)
    held = [begun(edge, b"") for _ in range(5)]
    with pytest.raises((OSError, ssl.SSLError)):
        begun(edge, b"")
    held.pop().close()
    wait_until(lambda: answers(edge))
    for connection in held:
        connection.close()
    edge.settings = before
    edge.load(ROLLOUT)
    wait_until(lambda: answers(edge))


def answers(edge: Edge) -> bool:
    try:
        return edge.call("/v2/health/live", method="GET")[0] == 200
    except OSError:
        return False


def test_a_head_of_many_small_parts_is_ended_in_time(edge: Edge) -> None:
    """Slowloris: a byte now and then does not make a head's time longer."""
    config = render(edge.routes(ROLLOUT), edge.keys, edge.settings)
    edge.haproxy.load(config.replace("timeout http-request 10s", "timeout http-request 700ms"))
    connections = [begun(edge, b"POST / HTTP/1.1\r\n") for _ in range(20)]
    began = time.monotonic()
    ended: set[int] = set()
    while len(ended) < len(connections):
        assert time.monotonic() - began < 10
        for number, connection in enumerate(connections):
            connection.settimeout(0.01)
            try:
                connection.sendall(b"X-a: b\r\n")
                if connection.recv(1000) is not None:
                    ended.add(number)
            except TimeoutError:
                continue
            except OSError:
                ended.add(number)
    for connection in connections:
        connection.close()
    edge.load(ROLLOUT)
