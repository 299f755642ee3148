"""What the edge says by itself, as HAProxy's configuration wants it."""

from __future__ import annotations

import json
from http import HTTPStatus

ERROR_STATUSES = (400, 401, 403, 404, 405, 408, 413, 429, 500, 502, 503, 504)
NO_ANSWER = "No replica answered; try again."


def error_body(status: int, message: str | None = None) -> str:
    """The contract's JSON error."""
    return json.dumps({"error": message or HTTPStatus(status).phrase, "code": status})


def error_file(status: int) -> str:
    """What HAProxy sends when it refuses by itself.

    That a replica gave no answer, or none in time, is 503 to a client; the access record keeps 502 and 504 apart.
    """
    if status in (502, 504):
        status, body = 503, error_body(503, NO_ANSWER)
    else:
        body = error_body(status)
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"


def say(body: str, *, status: int = 200) -> str:
    """A rule that answers with JSON."""
    return f"http-request return status {status} content-type application/json string '{_quoted(body)}'"


def refuse(status: int, message: str) -> str:
    """A rule that answers with the contract's JSON error."""
    return say(error_body(status, message), status=status)


def _quoted(text: str) -> str:
    """JSON inside HAProxy's single quotes, where no quote can be escaped but in JSON's own way."""
    return text.replace("'", r"\u0027")
