"""Pass requests from a replica's HTTP server directly to its application, without Serve's handling of each request.

Serve (2.60) makes an id, metadata, a context and metrics for every request. That takes a third of the time of an
answer, and is not needed, because the edge and the applications have their own. Serve accepts middlewares for its HTTP
servers, and the outermost middleware can answer itself. Requests from Serve's proxy and health checks still go through
Serve. A server that stops still waits for its open answers.
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

from serve_apps.replica.edge_only import edge_only
from serve_apps.replica.listening import answer_on_own_address
from serve_apps.replica.parsing import parse_heads_only

Application = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Direct:
    answer: Application
    prefix: str
    slots: asyncio.Semaphore


class DirectAnswers:
    """Middleware that answers requests below the application's prefix. Serve answers others, such as `/-/healthz`."""

    of_this_process: ClassVar[_Direct | None] = None
    """A class attribute, because Serve creates the application and the server without connecting them."""

    def __init__(self, app: ASGIApp) -> None:
        self._serve = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI request."""
        direct = self.of_this_process
        if direct is None or scope["type"] != "http" or not scope["path"].startswith(direct.prefix):
            await self._serve(scope, receive, send)
            return
        scope["root_path"] = direct.prefix
        async with direct.slots:
            response = await direct.answer(Request(scope, receive))
            await response(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return the middlewares of a server that Serve starts.

    `cluster.up` names this function in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Serve calls it just before it starts
    the server. Serve's proxy is such a server, too. It gets the requests for a version without a replica.
    """
    parse_heads_only()
    answer_on_own_address()
    return [Middleware(DirectAnswers), *edge_only()]


def answer_directly(answer: Application, *, max_concurrent: int) -> None:
    """Register the application of this replica. Outside a replica, this does nothing.

    Args:
        answer: the application.
        max_concurrent: largest number of requests that are handled at the same time. Other requests wait.
    """
    try:
        app = serve.get_replica_context().app_name
    except RayServeException:
        return
    DirectAnswers.of_this_process = _Direct(
        answer=answer, prefix=f"/{app}", slots=asyncio.Semaphore(max_concurrent)
    )
