"""Requests that a replica's server passes directly to its application, and those that it leaves to Serve."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from serve_apps.replica import direct
from serve_apps.replica.direct import DirectAnswers, answer_directly, middlewares


class Replica:
    """Serve's replica context, reduced to the application's name."""

    app_name = "m-v1"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectAnswers, "of_this_process", None)


async def serve_itself(scope: Any, receive: Any, send: Any) -> None:
    await Response("by Serve")(scope, receive, send)


async def ask(path: str) -> str:
    """The body of an answer."""
    [middleware] = middlewares()
    app = middleware.cls(serve_itself, *middleware.args, **middleware.kwargs)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "method": "GET", "path": path, "headers": [], "root_path": ""}, receive, send)
    return str(sent[-1]["body"].decode())


async def answer(request: Request) -> Response:
    return Response(request.scope["path"].removeprefix(request.scope["root_path"]))


def test_outside_a_replica_serve_answers_everything() -> None:
    """An example is Serve's proxy, which has the same middleware."""
    answer_directly(answer, max_concurrent=1)
    assert asyncio.run(ask("/m-v1/v2/models/m")) == "by Serve"


def test_replica_answers_directly_and_serve_answers_health_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The application sees the path without its prefix."""
    monkeypatch.setattr(direct.serve, "get_replica_context", Replica)
    answer_directly(answer, max_concurrent=1)
    assert asyncio.run(ask("/m-v1/v2/models/m")) == "/v2/models/m"
    assert asyncio.run(ask("/-/healthz")) == "by Serve"
    assert asyncio.run(ask("/-/routes")) == "by Serve"
    assert asyncio.run(ask("/others-v1/v2/models/m")) == "by Serve"


def test_requests_over_the_limit_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is `max_ongoing_requests`."""
    monkeypatch.setattr(direct.serve, "get_replica_context", Replica)
    ongoing: list[int] = [0]
    most: list[int] = []

    async def slow(request: Request) -> Response:
        ongoing[0] += 1
        most.append(ongoing[0])
        await asyncio.sleep(0)
        ongoing[0] -= 1
        return Response("x")

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(ask("/m-v1/x") for _ in range(10)))

    answer_directly(slow, max_concurrent=3)
    assert asyncio.run(all_at_once()) == ["x"] * 10
    assert max(most) == 3
