"""What a read of features gives: values, and for each whether it was found."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class Status(enum.StrEnum):
    """What is known of a value."""

    present = "present"
    null = "null"
    """The source said null."""
    missing = "missing"
    """Nothing is stored of the entity, or it was deleted."""
    expired = "expired"
    newer = "newer"
    """What is stored is later than that time. What was known then is not stored online; a training set says it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureVectors:
    """The features of some entities."""

    columns: dict[str, list[Any]]
    """`<view>__<feature>` to one value per entity."""
    status: dict[str, Sequence[str]]
    """Columns may share one list."""
