"""Which numbers and time spans a definition may state, checked when it is made."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

from cluster.errors import DefinitionError

LONGEST = timedelta(days=3_652_058)
"""Times lie within the years 1 to 9999, so no longer span makes a difference."""
CENTURY = timedelta(days=36_525)
MAX_BUCKETS = 65_536
"""Each bucket is a file of every batch."""
EXACT = 2**53 - 1
"""The greatest whole number that JSON, and so the ledger, holds exactly."""


def check_span(what: str, value: Any, *, longest: timedelta = LONGEST, zero: bool = False) -> None:
    """Refuse what is no time span, or one that is negative or too long.

    Args:
        what: names the limit and its owner.
        value: as it was given.
        longest: the longest that is allowed.
        zero: whether a span of nothing is allowed.

    Raises:
        DefinitionError
    """
    if not isinstance(value, timedelta):
        raise DefinitionError(f"{what} must be a timedelta, got {value!r}. Write timedelta(…).")
    if value < timedelta(0) and zero:
        raise DefinitionError(f"{what} must not be negative, got {value}.")
    if value < timedelta(0) or (not value and not zero):
        raise DefinitionError(f"{what} must be positive, got {value}.")
    if value > longest:
        raise DefinitionError(f"{what} must be at most {longest.days} days, got {value.days} days.")


def check_number(what: str, value: Any) -> None:
    """Refuse what is no finite number, or a whole one that the ledger cannot hold exactly.

    Raises:
        DefinitionError
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DefinitionError(f"{what} must be a number, got {value!r}.")
    if isinstance(value, int) and abs(value) > EXACT:
        raise DefinitionError(f"{what} is a whole number beyond 2^53 - 1. Give it as a float.")
    if not math.isfinite(value):
        raise DefinitionError(f"{what} must be finite, got {value}.")


def within(seconds: float | None) -> float | None:
    """A span as the ledger has it, at most the longest: older releases took any."""
    return None if seconds is None else min(seconds, LONGEST.total_seconds())


def check_buckets(num_buckets: int) -> None:
    """Refuse a number of buckets that no table should have.

    Raises:
        ValueError
    """
    if not 1 <= num_buckets <= MAX_BUCKETS:
        raise ValueError(f"num_buckets must be between 1 and {MAX_BUCKETS}, got {num_buckets}.")


def before(moment: datetime, span: timedelta) -> datetime:
    """The moment that lies a span earlier, or the first moment there is."""
    try:
        return moment - span
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)
