"""Replicas that are dead, hang or give no answer, behind a real HAProxy."""

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
from serve_apps.edge.haproxy.config import ANSWER_MS, render
from serve_apps.replica.targets import ScaledToZero
from tests.edge import PREDICT, ROLLOUT, Edge, treated_unit, wait_until
from tests.ports import free_port


@contextlib.contextmanager
def server(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Address of a server that does with a connection what it is told, until that raises an OSError."""
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


def healthy_and_then(answer: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """Health checks are answered, nothing else is."""

    def serve(connection: socket.socket) -> None:
        if connection.recv(65_536).startswith(b"GET /-/healthz"):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            connection.close()
        else:
            answer(connection)

    return serve


def asked(edge: Edge, over: http.client.HTTPSConnection | None = None) -> tuple[Any, ...]:
    """What a treated unit hears."""
    status, heard = edge.call(token=edge.token(), headers={"X-Unit-ID": treated_unit()}, over=over)
    return status, heard.get("path"), heard.get("x-falaj-variant"), heard.get("x-falaj-arm")


CHAMPION = (200, f"/m-v1{PREDICT}", "champion", "treatment")


def recorded(edge: Edge, number: int) -> list[dict[str, Any]]:
    """The last so many records, once they have been written."""
    before = len(edge.records())

    def mine() -> list[dict[str, Any]]:
        return [record for record in edge.records()[before:] if record["model"]]

    for _ in range(number):
        assert asked(edge) == CHAMPION
    wait_until(lambda: len(mine()) >= number)
    return mine()


@pytest.mark.parametrize("lost", ["dead", "absent"])
def test_a_treatment_without_a_replica_is_answered_for_by_the_champion(whole: Edge, lost: str) -> None:
    """From the first request on; the unit keeps its arm, so a crashing variant cannot hide its evidence."""
    targets = whole.targets | {"m-v2": (f"127.0.0.1:{free_port()}",)}
    if lost == "absent":
        del targets["m-v2"]
    whole.load_targets(targets)
    for record in recorded(whole, 5):
        assert (record["arm"], record["variant"], record["fallback"], record["status"]) == (
            "treatment",
            "champion",
            "1",
            200,
        )


def test_what_a_hanging_treatment_has_not_answered_goes_to_the_champion(whole: Edge) -> None:
    """Also the requests that had reached it before anybody knew."""
    reached = threading.Event()
    kept = []

    def hang(connection: socket.socket) -> None:
        kept.append(connection)
        reached.set()

    before = whole.settings
    whole.settings = replace(before, hang_ms=100)
    with server(hang) as address:
        whole.load_targets(whole.targets | {"m-v2": (address,)})
        assert asked(whole) == CHAMPION
        assert reached.wait(5)
    whole.settings = before


@pytest.mark.parametrize("champion", ["asleep", "awake"])
def test_a_champion_that_takes_its_time_is_asked_once(whole: Edge, champion: str) -> None:
    """Longer than a hanging treatment may: one that is just being woken, or one that is slow."""
    times = []

    def answer_late(connection: socket.socket) -> None:
        times.append(time.monotonic())
        threading.Event().wait(0.6)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        connection.close()

    def check_late(connection: socket.socket) -> None:
        threading.Event().wait(0.1)
        healthy_and_then(socket.socket.close)(connection)

    def die(connection: socket.socket) -> None:
        connection.close()
        raise ConnectionAbortedError

    settings = replace(whole.settings, hang_ms=20)
    with (
        server(healthy_and_then(answer_late)) as late,
        server(healthy_and_then(die) if champion == "asleep" else check_late) as lost,
    ):
        targets = {
            **whole.targets,
            "m-v1": ScaledToZero((late,)) if champion == "asleep" else (late,),
            "m-v2": (lost,),
        }
        whole.haproxy.load(render(whole.routes(ROLLOUT, targets), whole.keys, settings))
        if champion == "awake":
            wait_until(lambda: ",DOWN," in whole.ask("show stat m-v2:treated 4 -1"))
        status, _ = whole.call(token=whole.token(), headers={"X-Unit-ID": treated_unit()})
    assert (status, len(times)) == (200, 1)


def test_a_request_that_a_replica_drops_is_answered_by_another(whole: Edge) -> None:
    """Though the first one goes on answering its health checks."""
    with server(healthy_and_then(socket.socket.close)) as address:
        whole.load_targets(whole.targets | {"m-v2": (address, whole.targets["m-v2"][0])})
        for _ in range(10):
            assert asked(whole)[:3] == (200, f"/m-v2{PREDICT}", "challenger")


@pytest.mark.parametrize(
    ("answer", "status"),
    [(socket.socket.close, 502), (lambda connection: connection.sendall(b"no HTTP\r\n\r\n"), 502), (id, 504)],
)
def test_a_champion_that_gives_no_answer_is_503_to_the_client(
    whole: Edge, answer: Callable[[socket.socket], Any], status: int
) -> None:
    """And its access record says what it was."""
    kept = []

    def serve(connection: socket.socket) -> None:
        kept.append(connection)
        answer(connection)

    with server(healthy_and_then(serve)) as address:
        targets = whole.targets | {"m-v1": (address,)}
        config = render(whole.routes(ROLLOUT, targets), whole.keys, whole.settings)
        whole.haproxy.load(config.replace(f"timeout server {ANSWER_MS}ms", "timeout server 200ms"))
        before = len(whole.records())
        assert whole.call(token=whole.token()) == (503, {"error": NO_ANSWER, "code": 503})
        wait_until(lambda: len(whole.records()) > before)
        record = whole.records()[-1]
        assert (record["status"], record["termination"][1]) == (status, "H")
