"""Requests and answers as every application here handles them: bounded bodies, JSON errors, never a stack trace."""

from __future__ import annotations

import logging
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import (
    AccessDenied,
    FalajError,
    FeatureServiceNotFound,
    FeatureViewNotFound,
    InvalidRequest,
    ModelNotFound,
    OnlineStoreUnavailable,
    Unauthenticated,
)

LOG = logging.getLogger("falaj.serve")
MAX_BODY_BYTES = 1_000_000


class BodyTooLarge(FalajError):
    """HTTP 413."""


class Unavailable(FalajError):
    """HTTP 503: nothing was lost, try again."""


def answer(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(orjson.dumps(content), status_code=status, media_type="application/json", headers=headers)


def refusal(error: Exception) -> Response:
    """The response of an error: the contract's `{"error", "code"}`."""
    match error:
        case InvalidRequest():
            status, message = 400, str(error)
        case Unauthenticated():
            status, message = 401, str(error)
        case AccessDenied():
            status, message = 403, str(error)
        case ModelNotFound() | FeatureViewNotFound() | FeatureServiceNotFound():
            status, message = 404, str(error)
        case BodyTooLarge():
            status, message = 413, str(error)
        case Unavailable() | OnlineStoreUnavailable():
            status, message = 503, str(error)
        case _:
            LOG.error("a request failed", exc_info=error)
            status, message = 500, "The request failed inside the service; its operators can see why."
    return answer({"error": message, "code": status}, status=status)


async def read_json(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object.

    A body over the limit is read to its end and thrown away, so that the client gets to see the answer.

    Raises:
        BodyTooLarge, InvalidRequest
    """
    size, chunks = 0, []
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
    if size > MAX_BODY_BYTES:
        raise BodyTooLarge(f"The body has {size} bytes; the limit is {MAX_BODY_BYTES}.")
    try:
        content = orjson.loads(b"".join(chunks))
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is no valid JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidRequest("The body's JSON is nested too deeply.") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body must be a JSON object, got {type(content).__name__}.")
    return content
