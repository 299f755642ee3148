"""Requests go from a replica's HTTP server straight to its application, past Serve's own handling of each.

Serve (2.60) makes an id, metadata, a context and metrics for every request, which takes a third as long as answering
it does; the edge and the applications have their own. Serve lets its servers be given middlewares, and the outermost
may answer by itself. What Serve's proxy passes on, and what asks for a replica's health, goes Serve's way; and a server
that ends still waits for the answers that it owes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar

from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps.replica.parsing import parse_heads_only

Application = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Direct:
    answer: Application
    prefix: str
    places: asyncio.Semaphore


class DirectAnswers:
    """Answers a server's requests below its application's prefix; all others are Serve's: `/-/healthz`, say."""

    of_this_process: ClassVar[_Direct | None] = None
    """Serve makes an application, then the server, and shows neither to the other."""

    def __init__(self, app: ASGIApp) -> None:
        self._serve = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, by ASGI."""
        direct = self.of_this_process
        if direct is None or scope["type"] != "http" or not scope["path"].startswith(direct.prefix):
            await self._serve(scope, receive, send)
            return
        scope["root_path"] = direct.prefix
        async with direct.places:
            response = await direct.answer(Request(scope, receive))
            await response(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve calls when it starts a server; `cluster.up` names it in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.

    Its proxy is such a server, too: requests for a version without a replica pass through it.
    """
    parse_heads_only()
    return [Middleware(DirectAnswers)]


def answer_directly(answer: Application, *, at_once: int) -> None:
    """Have the requests of this replica answered directly; outside a replica nothing happens.

    Args:
        answer: the application.
        at_once: so many requests at most; the others wait.
    """
    try:
        app = serve.get_replica_context().app_name
    except RayServeException:
        return
    DirectAnswers.of_this_process = _Direct(
        answer=answer, prefix=f"/{app}", places=asyncio.Semaphore(at_once)
    )
