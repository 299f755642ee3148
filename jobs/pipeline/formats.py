"""Numbers as people read them."""

from __future__ import annotations

ABSENT = "–"


def integer(value: float) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,.0f}"


def score(value: float | None) -> str:
    """A metric between 0 and 1, to three places."""
    return ABSENT if value is None else f"{value:.3f}"


def fine(value: float | None) -> str:
    """A small figure, to four places."""
    return ABSENT if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A share as a percentage with one place."""
    return ABSENT if value is None else f"{value * 100:.1f}%"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{value * 100:+.1f} pp".replace("-", "−") if abs(value) >= 0.0005 else "0 pp"


def seconds(value: float) -> str:
    """83.4 as 1 min 23 s; below ten seconds with one place."""
    if value < 10:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def milliseconds(value: float) -> str:
    """12.34 as 12 ms; below ten with one place; from a second on in seconds."""
    if value >= 1000:
        return f"{value / 1000:.1f} s"
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def count(number: int, noun: str) -> str:
    """1 error, 2 errors, no errors."""
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
