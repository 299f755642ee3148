"""The result of an online read: feature values, and a status for each value."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class Status(enum.StrEnum):
    """The status of a feature value."""

    present = "present"
    null = "null"
    """The source has a null."""
    missing = "missing"
    """No row of the entity is stored, or the entity was deleted."""
    expired = "expired"
    """The value is older than the TTL."""
    newer = "newer"
    """The stored value became known only after the read's `as_of`. The online store has one row per entity, so an
    earlier value is available only in a training set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureVectors:
    """Feature values of a list of entities."""

    columns: dict[str, list[Any]]
    """`<view>__<feature>` to one value per entity."""
    status: dict[str, Sequence[str]]
    """`<view>__<feature>` to one status per entity. Columns may share one list object."""
