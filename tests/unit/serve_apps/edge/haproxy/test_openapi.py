"""The OpenAPI document: well-formed, small enough for the edge, and equal to real answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from cluster.security.tokens.roles import Role
from serve_apps.edge.openapi.document import MAX_BYTES, document
from tests.servers.edge import Edge

DOCUMENT = document()


def references(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        yield from ([content["$ref"]] if "$ref" in content else [])
        content = list(content.values())
    if isinstance(content, list):
        for one in content:
            yield from references(one)


def schema_of(operation: str, path: str, status: str) -> Any:
    """Return the schema of an operation's JSON answer, with everything that it refers to."""
    answer = DOCUMENT["paths"][path][operation]["responses"][status]
    if "$ref" in answer:
        answer = DOCUMENT["components"]["responses"][answer["$ref"].rsplit("/", 1)[1]]
    return answer["content"]["application/json"]["schema"] | {"components": DOCUMENT["components"]}


def test_schemas_and_references_are_valid() -> None:
    """Every part of the document is used."""
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    known = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "parameters", "responses", "requestBodies")
        for name in DOCUMENT["components"][kind]
    }
    assert set(references(DOCUMENT)) == known


def test_edge_serves_the_document_to_authenticated_clients(edge: Edge) -> None:
    """Unchanged, small enough for HAProxy's buffer; the edge accepts every path of it."""
    assert len(json.dumps(DOCUMENT, separators=(",", ":"))) < MAX_BYTES
    assert edge.call("/openapi.json", method="GET")[0] == 401
    assert edge.call("/openapi.json", method="GET", token=edge.token(Role.auditor)) == (200, DOCUMENT)
    for path, operations in DOCUMENT["paths"].items():
        for method in operations:
            real = path.format(model="m", version="1", job="job-1")
            if path.startswith(("/v1/jobs", "/v1/rollouts")):  # no service for them runs here
                assert edge.call(real, method=method.upper(), token=edge.token())[0] == 503
                continue
            assert edge.call(real, method=method.upper(), token=edge.token())[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("get", "/v2", "200"),
        ("get", "/v2/health/live", "200"),
        ("get", "/v2/health/ready", "200"),
        ("post", "/v2", "default"),
        ("post", "/v2/health/live", "default"),
    ],
)
def test_the_edges_own_answers_match_the_document(edge: Edge, method: str, path: str, status: str) -> None:
    """The edge gives these answers without a replica."""
    answered, content = edge.call(path, method=method.upper(), token=edge.token())
    assert answered == (200 if status == "200" else 405)
    Draft202012Validator(schema_of("get", path, status)).validate(content)
