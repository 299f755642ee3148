"""Parse and validate requests to the feature store, without access to a store."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from cluster.errors import InvalidRequest, did_you_mean
from serve_apps.predictor.request import parse_as_of, parse_entities

MAX_KEY_CHARS = 200
_READ, _PUSH = frozenset({"service", "entities", "as_of"}), frozenset({"view", "rows", "idempotency_key"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """A `features:read` request."""

    service: str
    entities: list[dict[str, Any]]
    as_of: dt.datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """A `features:push` request. Its rows are validated later, by the view."""

    view: str
    rows: Any
    idempotency_key: str
    digest: bytes
    """Hash of view and rows. A repeated push has the same hash."""


def parse_read(body: Mapping[str, Any], *, now: dt.datetime) -> Read:
    """Parse a `features:read` body.

    Raises:
        InvalidRequest: a field is wrong; the message names it.
    """
    _check_fields(body, _READ)
    return Read(
        service=_text(body, "service"),
        entities=parse_entities(body.get("entities")),
        as_of=parse_as_of(body.get("as_of"), now),
    )


def parse_push(body: Mapping[str, Any]) -> Push:
    """Parse a `features:push` body.

    Raises:
        InvalidRequest: a field is wrong; the message names it.
    """
    _check_fields(body, _PUSH)
    try:
        content = orjson.dumps([body.get("view"), body.get("rows")], option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:  # orjson can read deeper nesting than it can write
        raise InvalidRequest('"rows" is nested too deeply.') from error
    return Push(
        view=_text(body, "view"),
        rows=body.get("rows"),
        idempotency_key=_text(body, "idempotency_key"),
        digest=hashlib.blake2b(content, digest_size=16).digest(),
    )


def _check_fields(body: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := body.keys() - known:
        raise InvalidRequest(f"Unknown field '{min(unknown)}'.{did_you_mean(min(unknown), known)}")


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_KEY_CHARS:
        raise InvalidRequest(f'Give "{name}" as text of 1 to {MAX_KEY_CHARS} characters, got {value!r}.')
    return value
