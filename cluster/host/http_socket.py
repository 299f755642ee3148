"""HTTP services of the cluster behind the edge: each listens at a socket that only its owner may use."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from cluster.errors import InvalidRequest

BODY_S = 10.0
MAX_MESSAGE = 2000
RETRY_AFTER_S = 5
STOP_S = 2.0


class BodyRefused(Exception):
    """A body that is too large, too slow or compressed."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


def error_response(status: int, message: str) -> Response:
    """Return a JSON error of one line."""
    headers = {429: {"retry-after": str(RETRY_AFTER_S)}, 401: {"www-authenticate": "Bearer"}}.get(status)
    text = " ".join(message.split())[:MAX_MESSAGE]
    return JSONResponse({"error": text, "code": status}, status_code=status, headers=headers)


async def read_json(request: Request, *, max_bytes: int) -> Any:
    """Return the JSON of a body.

    Raises:
        BodyRefused: it is too large, too slow or compressed.
        InvalidRequest: it is no JSON.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise BodyRefused("Send the body without compression.", status=415)
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                data += part
                if len(data) > max_bytes:
                    raise BodyRefused(f"A body has at most {max_bytes:,} bytes.", status=413)
    except TimeoutError:
        raise BodyRefused(f"The body did not arrive within {BODY_S:.0f} s.", status=408) from None
    with suppress(ValueError, RecursionError):
        return json.loads(data)
    raise InvalidRequest("The body is not JSON.")


async def plain_error(request: Request, error: Exception) -> Response:
    """Return the JSON answer to an unknown path or a wrong method."""
    status = getattr(error, "status_code", 404)
    text = "No such path." if status == 404 else "This path does not take this method."
    response = error_response(status, text)
    response.headers.update(getattr(error, "headers", None) or {})
    return response


@contextlib.contextmanager
def listening(app: ASGIApp, path: Path) -> Iterator[None]:
    """Serve an application at a socket that only its owner may use, in a thread."""
    path.unlink(missing_ok=True)  # of a killed process; the lock says that no other process listens
    with socket.socket(socket.AF_UNIX) as listener:
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(128)  # a client that connects before the server runs waits
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=75)
        )
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True, name="http")
        thread.start()
        try:
            yield
        finally:
            server.should_exit = server.force_exit = True
            thread.join(STOP_S)
            path.unlink(missing_ok=True)
