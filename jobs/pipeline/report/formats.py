"""Format numbers for the report."""

from __future__ import annotations

ABSENT = "–"
"""Text of an unknown number."""


def integer(value: float) -> str:
    """Format a number with thousands separators: 1234567 becomes 1,234,567."""
    return f"{value:,.0f}"


def score(value: float | None) -> str:
    """Format a metric between 0 and 1 with three decimals."""
    return ABSENT if value is None else f"{value:.3f}"


def fine(value: float | None) -> str:
    """Format a small number with four decimals."""
    return ABSENT if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """Format a share as a percentage with one decimal."""
    return ABSENT if value is None else f"{value * 100:.1f}%"


def points(value: float) -> str:
    """Format a difference of shares in percentage points, with its sign."""
    return f"{value * 100:+.1f} pp".replace("-", "−") if abs(value) >= 0.0005 else "0 pp"


def seconds(value: float) -> str:
    """Format seconds: 83.4 becomes 1 min 23 s. Less than ten seconds get one decimal."""
    if value < 10:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def milliseconds(value: float) -> str:
    """Format milliseconds: 12.34 becomes 12 ms. Values below 10 get one decimal; from 1000 on they are in seconds."""
    if value >= 1000:
        return f"{value / 1000:.1f} s"
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def count(number: int, noun: str) -> str:
    """Format a count with its noun: 1 error, 2 errors, no errors."""
    if number == 0:
        return f"no {noun}s"
    return f"{integer(number)} {noun}" if number == 1 else f"{integer(number)} {noun}s"


FILTERS = {
    "integer": integer,
    "score": score,
    "fine": fine,
    "percent": percent,
    "seconds": seconds,
    "milliseconds": milliseconds,
}
