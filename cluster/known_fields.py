"""Read what another release has stored. Two releases can run together, and their classes may have different fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def known_fields(cls: type[Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored fields that a dataclass or named tuple has. The others are left out."""
    names = getattr(cls, "_fields", None) or cls.__dataclass_fields__
    return {name: value for name, value in stored.items() if name in names}
