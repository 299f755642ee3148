"""Requests and answers as every application here handles them: bounded bodies, JSON errors, never a stack trace.

A compressed body is refused: what it would grow to is not bounded by what was sent.
"""

from __future__ import annotations

import logging
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster.errors import (
    AccessDenied,
    FalajError,
    FeatureAbsent,
    FeatureServiceNotFound,
    FeatureViewNotFound,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    OnlineStoreUnavailable,
    Unauthenticated,
)
from serve_apps.replica.within import within

LOG = logging.getLogger("falaj.serve")
MAX_BODY_BYTES = 1_000_000
BODY_TIMEOUT_S = 10.0
"""For a whole body: while it comes, its request takes the place of another one."""
MAX_MESSAGE = 2000
"""Characters of an error's message; what it quotes of a request may be longer."""


class MethodNotAllowed(FalajError):
    """HTTP 405."""

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class BodyTooSlow(FalajError):
    """HTTP 408."""


class BodyTooLarge(FalajError):
    """HTTP 413."""


class EncodingNotSupported(FalajError):
    """HTTP 415."""


class Unavailable(FalajError):
    """HTTP 503: nothing was lost, try again."""


NUMPY = orjson.OPT_SERIALIZE_NUMPY
"""Lists of numbers come from the online store as arrays."""


def answer(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(
        orjson.dumps(content, option=NUMPY),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )


def refusal(error: Exception) -> Response:
    """The response of an error: the contract's `{"error", "code"}`."""
    headers, more = {}, {}
    match error:
        case FeatureAbsent():
            status, message, more = 400, str(error), {"features_status": error.status}
        case InvalidRequest():
            status, message = 400, str(error)
        case ClientDisconnect():
            status, message = 400, "The connection ended before the body did."
        case Unauthenticated():
            status, message = 401, str(error)
        case AccessDenied():
            status, message = 403, str(error)
        case ModelNotFound() | FeatureViewNotFound() | FeatureServiceNotFound():
            status, message = 404, error.public
        case MethodNotAllowed():
            status, message, headers = 405, str(error), {"allow": error.allow}
        case BodyTooSlow():
            status, message, headers = 408, str(error), {"connection": "close"}
        case BodyTooLarge():
            status, message = 413, str(error)
        case EncodingNotSupported():
            status, message, headers = 415, str(error), {"accept-encoding": "identity"}
        case ModelFailed():  # sent again, it would fail again
            status, message = 503, str(error)
        case Unavailable() | OnlineStoreUnavailable():
            status, message, headers = 503, str(error), {"retry-after": "1"}
        case _:
            LOG.error("a request failed", exc_info=error)
            status, message = 500, "The request failed inside the service; its operators can see why."
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}…"
    return answer({"error": message, "code": status, **more}, status=status, headers=headers)


async def read_body(request: Request) -> bytes:
    """The request's body.

    A body that is refused is read to its end and thrown away, so that the client gets to see the answer.

    Raises:
        BodyTooSlow, BodyTooLarge, EncodingNotSupported
        ClientDisconnect: the connection ended.
    """
    encoding = request.headers.get("content-encoding", "identity")
    try:
        size, body = await within(BODY_TIMEOUT_S, _received(request))
    except TimeoutError as error:
        raise BodyTooSlow(
            f"The body was not here {BODY_TIMEOUT_S:g} s after its head; send it faster, or less at a time."
        ) from error
    if encoding.strip().lower() not in ("", "identity"):
        raise EncodingNotSupported("The body is compressed; send it as it is, without Content-Encoding.")
    if size > MAX_BODY_BYTES:
        raise BodyTooLarge(f"The body has {size} bytes; the limit is {MAX_BODY_BYTES}.")
    return body


async def _received(request: Request) -> tuple[int, bytes]:
    """The size of a body, and of one that is not too large the body."""
    size, chunks, more = 0, [], True
    while more:
        message = await request.receive()  # `Request.stream` takes twice as long
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
        more = message.get("more_body", False)
    return size, b"".join(chunks)


async def read_json(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        BodyTooSlow, BodyTooLarge, EncodingNotSupported, InvalidRequest
    """
    return parse_json(await read_body(request))


def parse_json(data: bytes | memoryview) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InvalidRequest: it is none, or nested too deeply.
    """
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is no valid JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidRequest("The body's JSON is nested too deeply.") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body must be a JSON object, got {type(content).__name__}.")
    return content
