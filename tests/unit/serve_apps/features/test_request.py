"""Parsing of requests to the feature store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from cluster.errors import InvalidRequest
from serve_apps.features.request import parse_push, parse_read

NOW = datetime(2026, 1, 1, tzinfo=UTC)
READ = {"service": "credit", "entities": [{"person_id": 1}]}
PUSH = {"view": "income", "rows": [{"keys": {"person_id": 1}}], "idempotency_key": "k"}


def test_read_without_as_of_is_now() -> None:
    """An instant without a zone is UTC."""
    assert parse_read(READ, now=NOW).as_of == NOW
    assert parse_read(READ | {"as_of": "2020-01-01T00:00"}, now=NOW).as_of == datetime(2020, 1, 1, tzinfo=UTC)


def test_repeated_push_has_the_same_digest() -> None:
    """The order of names does not matter. Another row changes the digest; another idempotency key does not."""
    again = {"idempotency_key": "other", "rows": [{"keys": {"person_id": 1}}], "view": "income"}
    assert parse_push(PUSH).digest == parse_push(again).digest
    assert parse_push(PUSH).digest != parse_push(PUSH | {"rows": []}).digest


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, '"service" as text'),
        (READ | {"service": ""}, '"service" as text'),
        (READ | {"entities": []}, '"entities" as a list'),
        (READ | {"entities": [{"person_id": 1.5}]}, "must be text or a whole number"),
        (READ | {"as_of": "soon"}, "ISO 8601"),
        (READ | {"servise": 1}, "Did you mean 'service'"),
    ],
)
def test_wrong_read_is_refused(body: dict[str, Any], words: str) -> None:
    """The message names the field."""
    with pytest.raises(InvalidRequest, match=words):
        parse_read(body, now=NOW)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (PUSH | {"view": 1}, '"view" as text'),
        (PUSH | {"idempotency_key": None}, '"idempotency_key" as text'),
        (PUSH | {"idempotency_key": "k" * 201}, '"idempotency_key" as text'),
        (PUSH | {"key": "k"}, "Unknown field 'key'"),
    ],
)
def test_wrong_push_is_refused(body: dict[str, Any], words: str) -> None:
    """The message names the field."""
    with pytest.raises(InvalidRequest, match=words):
        parse_push(body)
