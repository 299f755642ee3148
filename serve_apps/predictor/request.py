"""What a client may ask, checked and turned into plain values; nothing here touches a store or a model."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from cluster.errors import InvalidRequest, did_you_mean, nearest
from cluster.runtime.signature import InputSpec
from cluster.runtime.values import NotOfType, ValueType, value_type
from feature_jobs.store.catalog.specifications import FieldSpec
from feature_jobs.store.types.dtypes import from_json, list_of

MAX_ENTITIES = 1000
MAX_INTEGER = 2**63
MAX_SHOWN = 60
_KNOWN_FIELDS = frozenset({"entities", "features", "as_of"})

Asked = InputSpec | FieldSpec
"""An input of the model, or one that an on-demand transform alone takes."""
Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ByKey:
    """A request of `:predict`: features are read by the entities' keys."""

    entities: list[dict[str, Any]]
    overrides: dict[str, list[Any]]
    """Input to one value per entity, taking the place of what the store holds."""
    as_of: dt.datetime


def parse_predict(body: dict[str, Any], inputs: Mapping[str, Asked], *, now: dt.datetime) -> ByKey:
    """The request in a `:predict` body.

    Raises:
        InvalidRequest: saying which field is wrong, and how.
    """
    if unknown := body.keys() - _KNOWN_FIELDS:
        raise InvalidRequest(f"Unknown field '{min(unknown)}'.{did_you_mean(min(unknown), _KNOWN_FIELDS)}")
    entities = parse_entities(body.get("entities"))
    overrides = {
        name: override(inputs, name, value, len(entities))
        for name, value in _object(body, "features").items()
    }
    return ByKey(entities=entities, overrides=overrides, as_of=parse_as_of(body.get("as_of"), now))


def override(inputs: Mapping[str, Asked], name: str, value: Any, count: int) -> list[Any]:
    """One value per entity for an input, from a single value or a list of them; a value may be a list itself.

    Raises:
        InvalidRequest: an unknown input, a wrong number of values, or one of the wrong type.
    """
    spec = inputs.get(name)
    if spec is None:
        raise InvalidRequest(f"The model has no input '{name}'.{nearest(name, inputs)}")
    is_list = spec.length is not None if isinstance(spec, InputSpec) else list_of(spec.dtype) is not None
    several = isinstance(value, list) and (not is_list or {type(one) for one in value} & {list, NoneType})
    values = value if several else [value] * count
    if len(values) != count:
        raise InvalidRequest(f"Input '{name}' has {len(values)} values for {count} entities.")
    return fit_values(spec, values)


def fit_values(spec: Asked, values: list[Any]) -> list[Any]:
    """The values as the input's type has them; null is always allowed.

    Raises:
        InvalidRequest: one is not of the type.
    """
    if isinstance(spec, FieldSpec):
        for value in values:
            _check_rich(spec, value)
        return values
    kind = value_type(spec.dtype)
    if kind is None:
        return _fit_unknown(spec, values)
    if spec.length is not None:
        return [None if value is None else _fit_list(spec, kind, value) for value in values]
    try:
        return kind.fit(values)
    except NotOfType as error:
        if isinstance(error.value, dict | list):
            got = type(error.value).__name__
            raise InvalidRequest(f"Input '{spec.name}' must be a single value, got {got}.") from error
        raise InvalidRequest(
            f"Input '{spec.name}' must be {error.wanted}, got {shown(error.value)}."
        ) from error


def _fit_list(spec: InputSpec, kind: ValueType, value: Any) -> list[Any]:
    """A list whose elements are of the input's type; what a float32 cannot hold is found when it is encoded."""
    try:
        if not isinstance(value, list) or len(value) != spec.length or None in value:
            raise NotOfType(value, "")
        return kind.fit(value)
    except NotOfType as error:
        raise InvalidRequest(
            f"Input '{spec.name}' must be a list of {spec.length} numbers ({spec.dtype}) or null, "
            f"got {shown(error.value)}."
        ) from error


def _check_rich(spec: FieldSpec, value: Any) -> None:
    """Refuse what is no list, date, time, decimal or bytes as the field has them; null is always allowed."""
    if value is None:
        return
    try:
        from_json(value, spec.dtype)
    except ValueError as error:
        raise InvalidRequest(f"Input '{spec.name}' must be {spec.dtype}: {error}.") from error


def _fit_unknown(spec: InputSpec, values: list[Any]) -> list[Scalar]:
    """Of a type that has no plain values of its own: numbers, as ever."""
    for value in values:
        if isinstance(value, dict | list):
            raise InvalidRequest(f"Input '{spec.name}' must be a single value, got {type(value).__name__}.")
        if isinstance(value, str):
            raise InvalidRequest(f"Input '{spec.name}' must be a number, got {shown(value)}.")
        if isinstance(value, int) and abs(value) >= MAX_INTEGER:
            raise InvalidRequest(f"Input '{spec.name}' is beyond 64 bits.")
    return values


def shown(value: Any) -> str:
    """What a client sent, for a message: the beginning of it, if it is long."""
    text = repr(value[:MAX_SHOWN] if isinstance(value, str | list) else value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def parse_entities(value: Any) -> list[dict[str, Any]]:
    """Entities by key, as a request gives them.

    Raises:
        InvalidRequest
    """
    if not isinstance(value, list) or not value:
        raise InvalidRequest('Give "entities" as a list with at least one object of entity keys.')
    if len(value) > MAX_ENTITIES:
        raise InvalidRequest(f"A request has at most {MAX_ENTITIES} entities, got {len(value)}.")
    for position, entity in enumerate(value):
        if not isinstance(entity, dict) or not entity:
            raise InvalidRequest(f"entities[{position}] must be an object of entity keys.")
        for key, one in entity.items():
            if not isinstance(one, str | int) or isinstance(one, bool):
                raise InvalidRequest(
                    f"entities[{position}].{key} must be text or a whole number, got {shown(one)}."
                )
            if isinstance(one, int) and abs(one) >= MAX_INTEGER:
                raise InvalidRequest(f"entities[{position}].{key} is beyond 64 bits.")
    return value


def _object(body: dict[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f'"{name}" must be an object, got {type(value).__name__}.')
    return value


def parse_as_of(value: Any, now: dt.datetime) -> dt.datetime:
    """A moment, as a request gives it; none is now.

    Raises:
        InvalidRequest
    """
    if value is None:
        return now
    try:
        return to_utc(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f'"as_of" must be an ISO 8601 instant, got {shown(value)}.') from error


def to_utc(text: str) -> dt.datetime:
    """An ISO 8601 instant; without a zone it is UTC.

    Raises:
        TypeError, ValueError, OverflowError: no instant, or none within the years 1 to 9999 in UTC.
    """
    instant = dt.datetime.fromisoformat(text)
    return instant.replace(tzinfo=dt.UTC) if instant.tzinfo is None else instant.astimezone(dt.UTC)
