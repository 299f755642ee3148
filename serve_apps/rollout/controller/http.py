"""HTTP interface of rollouts, behind the edge: `GET` and `POST /v1/rollouts/{model}`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.errors import (
    AccessDenied,
    FalajError,
    InvalidRequest,
    ModelNotFound,
    RefusedError,
    RolloutError,
    Unauthenticated,
)
from cluster.host.http_socket import BodyRefused, error_response, plain_error, read_json
from cluster.security.tokens.principal import Principal
from serve_apps.rollout.controller.operations import RolloutOperations

MAX_BODY_BYTES = 64 * 1024
LOG = logging.getLogger("falaj.rollouts")
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (Unauthenticated, 401),
    (AccessDenied, 403),
    (ModelNotFound, 404),
    (RolloutError, 409),
    (RefusedError, 400),
)
"""The status of each error. The first class that fits decides."""


class RolloutApi:
    """The application's endpoints.

    Args:
        operations: what callers do with rollouts.
    """

    def __init__(self, operations: RolloutOperations) -> None:
        self._operations = operations

    def app(self) -> Starlette:
        """Return the ASGI application."""
        path = "/v1/rollouts/{model}"
        return Starlette(
            routes=[
                Route(path, _answered(self._show), methods=["GET"]),
                Route(path, _answered(self._act), methods=["POST"]),
            ],
            exception_handlers={404: plain_error, 405: plain_error},
        )

    async def _show(self, request: Request) -> Response:
        principal = await self._principal(request)
        return JSONResponse(
            await asyncio.to_thread(self._operations.show, principal, request.path_params["model"])
        )

    async def _act(self, request: Request) -> Response:
        principal = await self._principal(request)
        body = await read_json(request, max_bytes=MAX_BODY_BYTES)
        model = request.path_params["model"]
        return JSONResponse(await asyncio.to_thread(self._operations.act, principal, model, body))

    async def _principal(self, request: Request) -> Principal:
        sent = request.headers.getlist("authorization")
        if len(sent) > 1:
            raise InvalidRequest("Send only one Authorization header.")
        return await asyncio.to_thread(self._operations.authenticate, sent[0] if sent else None)


def _answered(
    handler: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return error_response(400, "The client closed the connection.")
        except Exception as error:  # noqa: BLE001 - every error is answered, and unknown ones are logged
            return error_answer(error)

    return endpoint


def error_answer(error: Exception) -> Response:
    """Return the JSON answer to an error. It has no stack trace."""
    if isinstance(error, BodyRefused):
        return error_response(error.status, str(error))
    for kind, status in _STATUS:
        if isinstance(error, kind):
            return error_response(status, error.public if isinstance(error, RefusedError) else str(error))
    if isinstance(error, (sa.exc.SQLAlchemyError, FalajError, OSError)):
        LOG.warning("a request could not be answered: %s", type(error).__name__)
        return error_response(503, "The controller of rollouts cannot reach the ledger. Try again.")
    LOG.error("a request failed", exc_info=error)
    return error_response(500, "The controller of rollouts failed.")
