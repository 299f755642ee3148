"""Build the parts of a JSON schema."""

from __future__ import annotations

from typing import Any


def ref(name: str, kind: str = "schemas") -> dict[str, Any]:
    """Return a reference to a component."""
    return {"$ref": f"#/components/{kind}/{name}"}


def json_object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """Return the schema of an object that may have further properties."""
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def closed_object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """Return the schema of an object without further properties."""
    return json_object(properties, *required) | {"additionalProperties": False}


def optional_object(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with one optional property. Instead of the object, null is allowed."""
    return {"type": ["object", "null"], "properties": {name: schema}}


def array(items: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an array."""
    return {"type": "array", "items": items}
