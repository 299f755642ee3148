"""Clients that take connections without sending requests."""

from __future__ import annotations

import ssl
import time
from dataclasses import replace

import pytest

from serve_apps.edge.__main__ import EdgeConfig
from serve_apps.edge.haproxy.connections import MAX_LOGINS
from tests.servers.edge import PREDICT, ROLLOUT, Edge, answer_of
from tests.servers.polling import wait_until


def test_one_address_cannot_take_all_connections(edge: Edge) -> None:
    """Connections over the limit are closed at once; when one ends, another is accepted."""
    before = edge.settings
    edge.settings = replace(before, max_connections_of_one_address=5)
    edge.load(ROLLOUT)
    connections = [edge.send(b"") for _ in range(5)]
    with pytest.raises((OSError, ssl.SSLError)):
        edge.send(b"")
    connections.pop().close()
    wait_until(lambda: answers(edge))
    for connection in connections:
        connection.close()
    edge.settings = before
    edge.load(ROLLOUT)
    wait_until(lambda: answers(edge))


def answers(edge: Edge) -> bool:
    try:
        return edge.call("/v2/health/live", method="GET")[0] == 200
    except OSError:
        return False


def test_slow_head_is_ended_in_time(edge: Edge) -> None:
    """Slowloris: single bytes do not extend the time of a head."""
    edge.load_targets(timeout=("timeout http-request 10s", "timeout http-request 700ms"))
    connections = [edge.send(b"POST / HTTP/1.1\r\n") for _ in range(20)]
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


def test_unauthenticated_body_is_not_waited_for(edge: Edge) -> None:
    """The request gets 401 at once, whatever the number of streams."""
    assert answer_of(edge.send(begun_post(PREDICT), timeout_s=5))[0] == 401


def test_few_login_bodies_are_read_at_the_same_time(edge: Edge) -> None:
    """Login bodies are unauthenticated. If there are too many, other logins get 429."""
    login = begun_post("/ray/login")
    connections = [edge.send(login) for _ in range(MAX_LOGINS)]
    wait_until(lambda: f"conn_cur={MAX_LOGINS}" in edge.ask("show table logins_counted"))
    assert answer_of(edge.send(login + b"oken=abc"))[0] == 429
    for connection in connections:
        connection.close()
    wait_until(lambda: answer_of(edge.send(login + b"oken=abc"))[0] == 401)


def begun_post(path: str) -> bytes:
    """A request without a token, and one byte of its nine."""
    form = "Content-Type: application/x-www-form-urlencoded\r\nSec-Fetch-Site: same-origin"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n{form}\r\n\r\nt".encode()


def test_a_client_reaches_the_limit_of_requests_before_that_of_connections() -> None:
    """Otherwise a client with a connection for each request would have closed connections, and no 429."""
    config = EdgeConfig()
    assert 1.2 * config.limits.principal.concurrent < config.max_connections_of_one_address
