"""Checks of a request's head by a real HAProxy, before it waits for the body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.servers.edge import PREDICT, Edge


def answer_to_a_head(edge: Edge, headers: list[tuple[str, str]], *, path: str = PREDICT) -> tuple[int, Any]:
    """Send a head without its body, and return the answer's status and JSON."""
    connection = edge.connect()
    connection.timeout = 5
    connection.putrequest("POST", path)
    for name, value in [("authorization", f"Bearer {edge.token()}"), *headers]:
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


@pytest.mark.parametrize(
    ("length", "status"), [("100001", 413), ("9999999999", 413), ("10000000000", 400), ("9" * 19, 400)]
)
@pytest.mark.parametrize("path", [PREDICT, "/v1/outcomes", "/v2/models/m/infer"])
def test_length_is_checked_before_the_body(edge: Edge, path: str, length: str, status: int) -> None:
    """Over the edge's limit 413, not a length 400; neither waits."""
    answered, content = answer_to_a_head(edge, [("content-length", length)], path=path)
    assert (answered, content["code"]) == (status, status)


@pytest.mark.parametrize("units", [("a", "b"), ("a", "a"), ("", "a")])
def test_two_unit_headers_are_400(edge: Edge, units: tuple[str, str]) -> None:
    """Edge and replica could read different ones."""
    status, content = answer_to_a_head(
        edge, [*(("X-Unit-ID", unit) for unit in units), ("content-length", "0")]
    )
    assert (status, "X-Unit-ID" in content["error"]) == (400, True)


@pytest.mark.parametrize("colon", ["%3A", "%3a"])
@pytest.mark.parametrize("path", [PREDICT, "/v1/features:read", "/v1/features:push"])
def test_encoded_colon_is_a_colon(edge: Edge, path: str, colon: str) -> None:
    """Some clients encode it (RFC 3986, 3.3)."""
    status, echo = edge.call(path.replace(":", colon), token=edge.token())
    assert (status, echo["path"].endswith(path)) == (200, True)


@pytest.mark.parametrize(
    "path", ["/v1/models%3Apredict", "/v1/%3A", "/v1/models/m%3Apredict%3Apredict", "/%3Aread"]
)
def test_encoded_colons_elsewhere_are_404(edge: Edge, path: str) -> None:
    assert edge.call(path, token=edge.token())[0] == 404
