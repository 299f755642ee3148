"""Plans, traffic and evidence as JSON values, and back. Events hold them, and a replay reads them.

Numbers keep all their digits, so a verdict from the JSON form is the verdict from the original.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def as_json(value: Any) -> Any:
    """Return a dataclass of `cluster.statistics` as JSON values. NumPy's numbers become Python's."""
    if dataclasses.is_dataclass(value):
        return {one.name: as_json(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(as_json(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def from_json(cls: type[T], content: Mapping[str, Any]) -> T:
    """Return the dataclass whose JSON values `as_json` returned. Fields of a newer release are left out.

    Raises:
        ValueError, TypeError, KeyError: They are not those of this class.
    """
    hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
    return cls(**{name: _value(hints[name], item) for name, item in content.items() if name in hints})


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {one.name: hints[one.name] for one in dataclasses.fields(cls)}


def _value(hint: Any, value: Any) -> Any:
    """Return a JSON value as a value of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        return tuple(_value(arguments[0], item) for item in value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {_value(arguments[0], key): _value(arguments[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value)  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    return float(value) if hint is float else value
