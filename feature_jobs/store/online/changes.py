"""How rows of the online store that are made of many rows of a table are written: from what lies there already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from feature_jobs.store.online.rows import Horizon, OnlineRow

Made = Callable[[OnlineRow | None, bool], OnlineRow | None]
"""A row from the one that lies there, none where none does, and whether all was known then of an entity without a row.
It has another rank than that one; none leaves things as they are. What was done already it does not do again."""
Merge = Callable[[OnlineRow | None, OnlineRow, Horizon], OnlineRow | None]
"""The row to take along from a materialised one, none where none is, and the one of before, with what of that is from
beyond the horizon. It is greater than the materialised one; none leaves that as it is."""


@dataclass(frozen=True, slots=True)
class Change:
    """Of one entity's row."""

    keys: tuple[int | str, ...]
    made: Made
