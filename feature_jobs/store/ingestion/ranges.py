"""Backfilling a source by event time, in chunks: which chunks are still to be done.

A chunk is done when the ledger says so of the same content, so a backfill that was killed goes on where it was, and
ranges that overlap store no row twice, whatever their chunks.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.errors import ConfigError

MAX_CHUNKS = 10_000
_SPAN = re.compile(r"(\d+)([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


@dataclass(frozen=True, order=True, slots=True)
class TimeRange:
    """Event times from `start`, below `end`; UTC."""

    start: dt.datetime
    end: dt.datetime

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ConfigError(f"start must be before end, got {self.start} and {self.end}.")

    def __str__(self) -> str:
        return f"[{self.start.isoformat()}, {self.end.isoformat()})"


def chunks(wanted: TimeRange, span: dt.timedelta | None, done: Iterable[TimeRange]) -> list[TimeRange]:
    """What of a range is still to be done, cut at multiples of a span from its start.

    Args:
        wanted: the range.
        span: none does not cut.
        done: ranges, in any order, that may overlap.

    Raises:
        ConfigError: more chunks than make sense.
    """
    if span is not None and (wanted.end - wanted.start) / span > MAX_CHUNKS:
        raise ConfigError(f"The range has more than {MAX_CHUNKS} chunks of {span}. Give a longer chunk.")
    result = []
    for piece in _without(wanted, done):
        start = piece.start
        while start < piece.end:
            end = piece.end
            if span is not None:
                whole = (start - wanted.start) // span
                if (whole + 1) * span < wanted.end - wanted.start:
                    end = min(end, wanted.start + (whole + 1) * span)
            result.append(TimeRange(start, end))
            start = end
    return result


def parse_range(start: str | None, end: str | None) -> TimeRange | None:
    """The range of a command; none where it names no time.

    Raises:
        ConfigError: only one end, or no ISO 8601 instant.
    """
    if start is None and end is None:
        return None
    if start is None or end is None:
        raise ConfigError("Give both start and end; end itself is not in the range.")
    return TimeRange(parse_instant(start, name="start"), parse_instant(end, name="end"))


def parse_span(text: str | None) -> dt.timedelta | None:
    """A span as `30d`, `12h` or `15m`.

    Raises:
        ConfigError: something else.
    """
    if text is None:
        return None
    found = _SPAN.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise ConfigError(f"chunk must be a span such as 30d, 12h or 15m, got '{text}'.")
    try:
        return dt.timedelta(**{_UNITS[found[2]]: int(found[1])})
    except (OverflowError, ValueError) as error:
        raise ConfigError("chunk is longer than time spans can be. Leave it out for one batch.") from error


def _without(wanted: TimeRange, done: Iterable[TimeRange]) -> Iterable[TimeRange]:
    start = wanted.start
    for one in sorted(done):
        if one.start >= wanted.end:
            break
        if one.start > start:
            yield TimeRange(start, one.start)
        start = max(start, one.end)
    if start < wanted.end:
        yield TimeRange(start, wanted.end)


def parse_instant(text: str, *, name: str) -> dt.datetime:
    """A moment from ISO 8601, UTC where no zone is given.

    Raises:
        ConfigError: the text is no moment; `name` is what it was given for.
    """
    try:
        moment = dt.datetime.fromisoformat(text)
        return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{name} must be an ISO 8601 instant such as 2024-01-31 or 2024-01-31T00:00:00Z, got '{text}'."
        ) from error
