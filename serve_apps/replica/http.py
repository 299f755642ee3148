"""HTTP requests and answers of all applications: bodies of limited size, and JSON errors without stack traces.

Compressed bodies are refused, because a small body may be very large after decompression.
"""

from __future__ import annotations

import logging
from typing import Any

import orjson
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as DatabaseTimeout
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
from cluster.security.keys.store import KeyStoreUnavailable
from serve_apps.replica.http_contract import MAX_BODY_BYTES, TRY_ANOTHER
from serve_apps.replica.timeouts import with_timeout

LOG = logging.getLogger("falaj.serve")
BODY_TIMEOUT_S = 10.0
"""Timeout for a whole body. While a body arrives, its request uses a slot that another request could use."""
MAX_MESSAGE = 2000
"""An error message has at most this many characters. It may quote a longer text of the request."""


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
    """HTTP 503. Nothing is lost, and the client can try again."""


class ReplicaUnavailable(Unavailable):
    """This replica cannot answer, for example because its node's disk is full. Another one may; see `TRY_ANOTHER`."""


class OutageOfDatabase(Unavailable):
    """A database that all replicas use does not answer."""


NUMPY = orjson.OPT_SERIALIZE_NUMPY
"""Needed because the online store returns lists of numbers as arrays."""


def answer(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(
        orjson.dumps(content, option=NUMPY),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )


def refusal(error: Exception) -> Response:
    """Return the response for an error: JSON `{"error", "code"}`."""
    headers, details = {}, {}
    match error:
        case FeatureAbsent():
            status, message, details = 400, str(error), {"features_status": error.status}
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
        case ModelFailed():  # no retry-after, because the same request would fail again
            status, message = 503, str(error)
        case ReplicaUnavailable():
            status, message, headers = TRY_ANOTHER, str(error), {"retry-after": "1"}
        case Unavailable() | OnlineStoreUnavailable():
            status, message, headers = 503, str(error), {"retry-after": "1"}
        case DBAPIError() | DatabaseTimeout():
            LOG.error("the ledger's database failed", exc_info=error)
            status, message, headers = 503, "The ledger's database cannot be used now.", {"retry-after": "1"}
        case KeyStoreUnavailable():  # another replica may have fetched the key earlier
            LOG.error("the key store does not answer", exc_info=error)
            status, message, headers = TRY_ANOTHER, "The key store cannot be used now.", {"retry-after": "1"}
        case _:
            LOG.error("a request failed", exc_info=error)
            status, message = 500, "The request failed inside the service; its log has the reason."
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]}…"
    code = 503 if status == TRY_ANOTHER else status  # the edge gives clients 503
    return answer({"error": message, "code": code, **details}, status=status, headers=headers)


async def read_body(request: Request) -> bytes:
    """Return the request's body.

    A refused body is read to its end and not stored. Otherwise, the client would not receive the answer.

    Raises:
        BodyTooSlow, BodyTooLarge, EncodingNotSupported: the body is refused.
        ClientDisconnect: the connection ended.
    """
    encoding = request.headers.get("content-encoding", "identity")
    try:
        size, body = await with_timeout(BODY_TIMEOUT_S, _receive(request))
    except TimeoutError as error:
        raise BodyTooSlow(
            f"The body did not arrive within {BODY_TIMEOUT_S:g} s after its head. Send it faster, or send less."
        ) from error
    if encoding.strip().lower() not in ("", "identity"):
        raise EncodingNotSupported("The body is compressed. Send it uncompressed, without Content-Encoding.")
    if size > MAX_BODY_BYTES:
        raise BodyTooLarge(f"The body has {size} bytes; the limit is {MAX_BODY_BYTES}.")
    return body


async def _receive(request: Request) -> tuple[int, bytes]:
    """Return the size of a body, and the body if it is not too large."""
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
    """Return the request's body as a JSON object.

    Raises:
        BodyTooSlow, BodyTooLarge, EncodingNotSupported: the body is refused.
        InvalidRequest: the body is not a JSON object.
    """
    return parse_json(await read_body(request))


def parse_json(data: bytes | memoryview) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        InvalidRequest: the text is not a JSON object, or is nested too deeply.
    """
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidRequest("The body's JSON is nested too deeply.") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body must be a JSON object, got {type(content).__name__}.")
    return content
