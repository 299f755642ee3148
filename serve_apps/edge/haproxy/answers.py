"""Answers that HAProxy gives itself, without a replica: rules and error files of its configuration."""

from __future__ import annotations

import json
from http import HTTPStatus

ERROR_STATUSES = (400, 401, 403, 404, 405, 408, 413, 429, 500, 502, 503, 504)
NO_ANSWER = "No replica answered; try again."
NO_HEALTHY_REPLICA = "No healthy replica; try again."


def error_body(status: int, message: str | None = None) -> str:
    """Return the JSON error body `{"error", "code"}`. Without a message, it has the standard phrase of the status."""
    return json.dumps({"error": message or HTTPStatus(status).phrase, "code": status})


def error_file(status: int) -> str:
    """Return the HTTP response that HAProxy sends when it detects an error itself.

    For the statuses 502 (no answer) and 504 (no answer in time), the client gets 503. The access record has the
    original status.
    """
    if status in (502, 504):
        status, body = 503, error_body(503, NO_ANSWER)
    else:
        body = error_body(status)
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"


def answer_json(body: str, *, status: int = 200) -> str:
    """Return a rule that makes HAProxy answer with JSON."""
    return f"http-request return status {status} content-type application/json string '{_quoted(body)}'"


def refuse(status: int, message: str) -> str:
    """Return a rule that makes HAProxy answer with a JSON error."""
    return answer_json(error_body(status, message), status=status)


def _quoted(text: str) -> str:
    """Replace single quotes by their JSON escape, because HAProxy has no escape inside single quotes."""
    return text.replace("'", r"\u0027")
