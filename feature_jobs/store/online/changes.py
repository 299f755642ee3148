"""Types for updates of online rows that are made from many table rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from feature_jobs.store.online.rows import Horizon, OnlineRow

MakeRow = Callable[[OnlineRow | None, bool], OnlineRow | None]
"""Makes the new row of an entity, or returns None to change nothing.

Arguments: the stored row (None if the entity has no row), and whether the view was materialised, so that an entity
without a row is known to have no values. The new row has another rank than the stored one. The function is idempotent:
applied to its own result it changes nothing.
"""
Merge = Callable[[OnlineRow | None, OnlineRow, Horizon], OnlineRow | None]
"""Merges a stored row into a newly materialised one, or returns None to keep the new row.

Arguments: the materialised row (None if the entity has none), the row of the previous generation, and the horizon. The
result also contains what the previous row has beyond the horizon. Its rank is greater than the materialised row's.
"""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one entity's row."""

    keys: tuple[int | str, ...]
    make: MakeRow
