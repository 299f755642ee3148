"""Replicas that are dead, hang or do not answer, behind a real HAProxy."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from serve_apps.edge.haproxy.answers import NO_ANSWER
from serve_apps.edge.haproxy.config import ANSWER_MS
from serve_apps.replica.targets import ScaledToZero
from tests.servers.edge import PREDICT, Edge, treated_unit
from tests.servers.polling import wait_until
from tests.servers.ports import free_port


@contextlib.contextmanager
def server(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Address of a server that passes each connection to a function, until that raises an OSError."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    serve(listener.accept()[0])
            listener.close()

        threading.Thread(target=accept, daemon=True).start()
        host, port = listener.getsockname()
        yield f"{host}:{port}"
        with contextlib.suppress(OSError):  # it is closed already
            listener.shutdown(socket.SHUT_RDWR)


def healthy_but(answer: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """Answer health checks, and pass other connections on."""

    def serve(connection: socket.socket) -> None:
        if connection.recv(65_536).startswith(b"GET /-/healthz"):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            connection.close()
        else:
            answer(connection)

    return serve


def answer_to_treated_unit(edge: Edge, over: http.client.HTTPSConnection | None = None) -> tuple[Any, ...]:
    """Return what a treated unit gets."""
    status, echo = edge.call(token=edge.token(), headers={"X-Unit-ID": treated_unit()}, over=over)
    return status, echo.get("path"), echo.get("x-falaj-variant"), echo.get("x-falaj-arm")


CHAMPION = (200, f"/m-v1{PREDICT}", "champion", "treatment")


def last_records(edge: Edge, number: int) -> list[dict[str, Any]]:
    """Return the last access records, once they have been written."""
    before = len(edge.records())

    def new_records() -> list[dict[str, Any]]:
        return [record for record in edge.records()[before:] if record["model"]]

    for _ in range(number):
        assert answer_to_treated_unit(edge) == CHAMPION
    wait_until(lambda: len(new_records()) >= number)
    return new_records()


@pytest.mark.parametrize("lost", ["dead", "absent"])
def test_champion_answers_for_a_treatment_without_a_replica(whole: Edge, lost: str) -> None:
    """From the first request on; the unit keeps its arm, so a crashing variant cannot hide its failures."""
    targets = whole.targets | {"m-v2": (f"127.0.0.1:{free_port()}",)}
    if lost == "absent":
        del targets["m-v2"]
    whole.load_targets(targets)
    for record in last_records(whole, 5):
        values = [record[name] for name in ("arm", "variant", "fallback", "status")]
        assert values == ["treatment", "champion", "1", 200]


def test_requests_in_a_hanging_treatment_go_to_the_champion(whole: Edge) -> None:
    """This includes requests that reached the treatment before the hang was detected."""
    reached = threading.Event()
    open_connections = []

    def hang(connection: socket.socket) -> None:
        open_connections.append(connection)
        reached.set()

    with server(hang) as address:
        settings = replace(whole.settings, hang_ms=100)
        whole.load_targets(whole.targets | {"m-v2": (address,)}, settings=settings)
        assert answer_to_treated_unit(whole) == CHAMPION
        assert reached.wait(5)


@pytest.mark.parametrize("champion", ["scaled_to_zero", "slow"])
def test_slow_champion_gets_a_request_once(whole: Edge, champion: str) -> None:
    """This is true even if the champion takes longer than a treatment's hang limit: it starts from zero, or is slow."""
    times = []

    def answer_late(connection: socket.socket) -> None:
        times.append(time.monotonic())
        threading.Event().wait(0.6)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        connection.close()

    def check_late(connection: socket.socket) -> None:
        threading.Event().wait(0.1)
        healthy_but(socket.socket.close)(connection)

    def die(connection: socket.socket) -> None:
        connection.close()
        raise ConnectionAbortedError

    settings = replace(whole.settings, hang_ms=20)
    with (
        server(healthy_but(answer_late)) as late,
        server(healthy_but(die) if champion == "scaled_to_zero" else check_late) as lost,
    ):
        targets = {
            **whole.targets,
            "m-v1": ScaledToZero((late,)) if champion == "scaled_to_zero" else (late,),
            "m-v2": (lost,),
        }
        whole.load_targets(targets, settings=settings)
        if champion == "slow":
            wait_until(lambda: ",DOWN," in whole.ask("show stat m-v2:treated 4 -1"))
        status, _ = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
    assert (status, len(times)) == (200, 1)


def test_request_that_a_replica_drops_is_answered_by_another(whole: Edge) -> None:
    """Although the first one still answers its health checks."""
    with server(healthy_but(socket.socket.close)) as address:
        whole.load_targets(whole.targets | {"m-v2": (address, whole.targets["m-v2"][0])})
        for _ in range(10):
            assert answer_to_treated_unit(whole)[:3] == (200, f"/m-v2{PREDICT}", "challenger")


@pytest.mark.parametrize(
    ("answer", "status"),
    [(socket.socket.close, 502), (lambda connection: connection.sendall(b"no HTTP\r\n\r\n"), 502), (id, 504)],
)
def test_champion_without_an_answer_is_503_to_the_client(
    whole: Edge, answer: Callable[[socket.socket], Any], status: int
) -> None:
    """The access record has the real status."""
    open_connections = []

    def serve(connection: socket.socket) -> None:
        open_connections.append(connection)
        answer(connection)

    with server(healthy_but(serve)) as address:
        timeout = (f"timeout server {ANSWER_MS}ms", "timeout server 200ms")
        whole.load_targets(whole.targets | {"m-v1": (address,)}, timeout=timeout)
        before = len(whole.records())
        assert whole.call(token=whole.token()) == (503, {"error": NO_ANSWER, "code": 503})
        wait_until(lambda: len(whole.records()) > before)
        record = whole.records()[-1]
        assert (record["status"], record["termination"][1]) == (status, "H")
