"""Limits for numbers and time spans in definitions."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

from cluster.errors import DefinitionError

LONGEST = timedelta(days=3_652_058)
"""Longest time span. All times are in the years 1 to 9999, so a longer span would have the same effect."""
CENTURY = timedelta(days=36_525)
MAX_BUCKETS = 65_536
"""Maximum number of buckets of a table. Each batch writes one file per bucket."""
EXACT = 2**53 - 1
"""Greatest whole number that is exact in JSON, and therefore in the ledger."""


def validate_span(
    subject: str, value: Any, *, longest: timedelta = LONGEST, allow_zero: bool = False
) -> None:
    """Validate a time span.

    Args:
        subject: Names the span and its owner, for messages.
        value: The value to validate.
        longest: The longest valid span.
        allow_zero: Whether a span of zero is valid.

    Raises:
        DefinitionError: The value is not a timedelta, is negative, or is too long.
    """
    if not isinstance(value, timedelta):
        raise DefinitionError(f"{subject} must be a timedelta, got {value!r}. Write timedelta(…).")
    if value < timedelta(0) and allow_zero:
        raise DefinitionError(f"{subject} must not be negative, got {value}.")
    if value < timedelta(0) or (not value and not allow_zero):
        raise DefinitionError(f"{subject} must be positive, got {value}.")
    if value > longest:
        raise DefinitionError(f"{subject} must be at most {longest.days} days, got {value.days} days.")


def validate_number(subject: str, value: Any) -> None:
    """Validate a number.

    Args:
        subject: Names the number and its owner, for messages.
        value: The value to validate.

    Raises:
        DefinitionError: The value is not a finite number, or is a whole number that is not exact in the ledger.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DefinitionError(f"{subject} must be a number, got {value!r}.")
    if isinstance(value, int) and abs(value) > EXACT:
        raise DefinitionError(f"{subject} is a whole number greater than 2^53 - 1. Write it as a float.")
    if not math.isfinite(value):
        raise DefinitionError(f"{subject} must be finite, got {value}.")


def clamp_span_s(seconds: float | None) -> float | None:
    """Limit a recorded span to `LONGEST`. Older releases recorded spans of any length."""
    return None if seconds is None else min(seconds, LONGEST.total_seconds())


def validate_num_buckets(num_buckets: int, *, option: str = "num_buckets") -> None:
    """Validate the number of buckets of a table.

    Args:
        num_buckets: The number.
        option: Name of the command's option, for the message.

    Raises:
        ValueError: The number is not from 1 to `MAX_BUCKETS`.
    """
    if not 1 <= num_buckets <= MAX_BUCKETS:
        raise ValueError(f"{option} must be between 1 and {MAX_BUCKETS}, got {num_buckets}.")


def subtract_span(moment: datetime, span: timedelta) -> datetime:
    """Return the time that is `span` before `moment`, or the first time of the year 1 if the result is earlier."""
    try:
        return moment - span
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)
