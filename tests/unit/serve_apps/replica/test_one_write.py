"""Head and body of an answer leave in one write, over a real server."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from uvicorn.protocols.http import httptools_impl

from serve_apps.replica.one_write import answer_in_one_write
from tests.servers.replica import served

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]}


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers as its path says."""
    match scope["path"]:
        case "/whole":
            await send(START)
            await send({"type": "http.response.body", "body": b"answer"})
        case "/parts":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for body, more in ((b"ans", True), (b"wer", True), (b"", False)):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        case "/fails":
            await send(START)
            raise ValueError("between head and body")


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(vars(httptools_impl), "RequestResponseCycle", httptools_impl.RequestResponseCycle)
    answer_in_one_write()
    with served(app) as running:
        yield running


def test_answer_arrives_in_one_read_and_the_connection_stays(address: str) -> None:
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        for _ in range(20):
            connection.sendall(b"GET /whole HTTP/1.1\r\nhost: h\r\n\r\n")
            answer = connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answer.endswith(b"\r\n\r\nanswer")


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [("/parts", 200, b"answer"), ("/fails", 500, b"Internal Server Error"), ("/whole", 200, b"answer")],
)
def test_other_answers_are_unchanged(address: str, path: str, status: int, body: bytes) -> None:
    """The answer has several parts, the application fails before the body, or the connection ends after the answer."""
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", path, headers={"connection": "close"})
    response = connection.getresponse()
    assert (response.status, response.read()) == (status, body)
    connection.close()
