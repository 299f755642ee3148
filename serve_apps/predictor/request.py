"""Parse and validate `:predict` requests into plain values, without access to a store or a model."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from cluster.errors import InvalidRequest, did_you_mean, suggest_name
from cluster.runtime.signature import InputSpec
from cluster.runtime.values import ValueType, WrongValueType, value_type
from feature_jobs.store.catalog.specifications import FieldSpec
from feature_jobs.store.types.dtypes import from_json, list_of
from serve_apps.replica.http_contract import MAX_ENTITIES

MAX_INTEGER = 2**63
MAX_QUOTED = 60
"""A message contains at most this many characters of a client's value."""
_KNOWN_FIELDS = frozenset({"entities", "features", "as_of"})

RequestInput = InputSpec | FieldSpec
"""An input of the model, or an input of on-demand transforms only."""
Scalar = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictRequest:
    """A `:predict` request. The features are read with the join keys of its entities."""

    entities: list[dict[str, Any]]
    overrides: dict[str, list[Any]]
    """From input to one value for each entity. These values replace the stored values."""
    as_of: dt.datetime


def parse_predict(
    body: dict[str, Any], inputs: Mapping[str, RequestInput], *, now: dt.datetime
) -> PredictRequest:
    """Parse a `:predict` body.

    Raises:
        InvalidRequest: a field is wrong; the message names it.
    """
    if unknown := body.keys() - _KNOWN_FIELDS:
        raise InvalidRequest(f"Unknown field '{min(unknown)}'.{did_you_mean(min(unknown), _KNOWN_FIELDS)}")
    entities = parse_entities(body.get("entities"))
    overrides = {
        name: override(inputs, name, value, len(entities))
        for name, value in _object(body, "features").items()
    }
    as_of = parse_as_of(body.get("as_of"), now)
    return PredictRequest(entities=entities, overrides=overrides, as_of=as_of)


def override(inputs: Mapping[str, RequestInput], name: str, value: Any, count: int) -> list[Any]:
    """Return a list with one value for each entity, from a single value or a list. A value may itself be a list.

    Raises:
        InvalidRequest: the input is unknown, the number of values is wrong, or a value has the wrong type.
    """
    spec = inputs.get(name)
    if spec is None:
        raise InvalidRequest(f"The model has no input '{name}'.{suggest_name(name, inputs)}")
    is_list = spec.length is not None if isinstance(spec, InputSpec) else list_of(spec.dtype) is not None
    several = isinstance(value, list) and (not is_list or {type(one) for one in value} & {list, NoneType})
    values = value if several else [value] * count
    if len(values) != count:
        raise InvalidRequest(f"Input '{name}' has {len(values)} values for {count} entities.")
    return fit_values(spec, values)


def fit_values(spec: RequestInput, values: list[Any]) -> list[Any]:
    """Convert values to the input's type. Null is always allowed.

    Raises:
        InvalidRequest: a value does not fit the type.
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
        return kind.convert(values)
    except WrongValueType as error:
        if isinstance(error.value, dict | list):
            got = type(error.value).__name__
            raise InvalidRequest(f"Input '{spec.name}' must be a single value, got {got}.") from error
        raise InvalidRequest(
            f"Input '{spec.name}' must be {error.expected}, got {shortened(error.value)}."
        ) from error


def _fit_list(spec: InputSpec, kind: ValueType, value: Any) -> list[Any]:
    """Validate a list for an input. Numbers outside the range of float32 are found later, when the list is encoded."""
    try:
        if not isinstance(value, list) or len(value) != spec.length or None in value:
            raise WrongValueType(value, "")
        return kind.convert(value)
    except WrongValueType as error:
        raise InvalidRequest(
            f"Input '{spec.name}' must be a list of {spec.length} numbers ({spec.dtype}) or null, "
            f"got {shortened(error.value)}."
        ) from error


def _check_rich(spec: FieldSpec, value: Any) -> None:
    """Validate a list, date, time, decimal or bytes for a field's type. Null is always allowed."""
    if value is None:
        return
    try:
        from_json(value, spec.dtype)
    except ValueError as error:
        raise InvalidRequest(f"Input '{spec.name}' must be {spec.dtype}: {error}.") from error


def _fit_unknown(spec: InputSpec, values: list[Any]) -> list[Scalar]:
    """Accept only numbers, for an input whose type has no plain values."""
    for value in values:
        if isinstance(value, dict | list):
            raise InvalidRequest(f"Input '{spec.name}' must be a single value, got {type(value).__name__}.")
        if isinstance(value, str):
            raise InvalidRequest(f"Input '{spec.name}' must be a number, got {shortened(value)}.")
        if isinstance(value, int) and abs(value) >= MAX_INTEGER:
            raise InvalidRequest(f"Input '{spec.name}' is beyond 64 bits.")
    return values


def shortened(value: Any) -> str:
    """Return a client's value as text for a message, cut to `MAX_QUOTED` characters."""
    text = repr(value[:MAX_QUOTED] if isinstance(value, str | list) else value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"


def parse_entities(value: Any) -> list[dict[str, Any]]:
    """Validate a request's entities: objects of join keys.

    Raises:
        InvalidRequest: there are too few or too many entities, or a key is neither text nor a 64-bit integer.
    """
    if not isinstance(value, list) or not value:
        raise InvalidRequest('Give "entities" as a list with at least one object of entity keys.')
    if len(value) > MAX_ENTITIES:
        raise InvalidRequest(f"A request has at most {MAX_ENTITIES} entities, got {len(value)}.")
    for position, entity in enumerate(value):
        if not isinstance(entity, dict) or not entity:
            raise InvalidRequest(f"entities[{position}] must be an object of entity keys.")
        for key, key_value in entity.items():
            if not isinstance(key_value, str | int) or isinstance(key_value, bool):
                raise InvalidRequest(
                    f"entities[{position}].{key} must be text or a whole number, got {shortened(key_value)}."
                )
            if isinstance(key_value, int) and abs(key_value) >= MAX_INTEGER:
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
    """Parse a request's `as_of`. If it is None, return `now`.

    Raises:
        InvalidRequest: `as_of` is not an ISO 8601 instant.
    """
    if value is None:
        return now
    try:
        return to_utc(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f'"as_of" must be an ISO 8601 instant, got {shortened(value)}.') from error


def to_utc(text: str) -> dt.datetime:
    """Parse an ISO 8601 instant. An instant without a time zone is in UTC.

    Raises:
        TypeError, ValueError, OverflowError: the text is not an instant, or is outside the years 1 to 9999 in UTC.
    """
    instant = dt.datetime.fromisoformat(text)
    return instant.replace(tzinfo=dt.UTC) if instant.tzinfo is None else instant.astimezone(dt.UTC)
