"""Split a range of event times into chunks for a backfill, without the ranges that are stored already.

A chunk is done if the ledger has an event for this chunk of the same content. So a backfill that was killed continues
with the missing chunks. Overlapping ranges store no row twice, whatever their chunk lengths.
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
    """Event times from `start` (inclusive) to `end` (exclusive), in UTC."""

    start: dt.datetime
    end: dt.datetime

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ConfigError(f"start must be before end, got {self.start} and {self.end}.")

    def __str__(self) -> str:
        return f"[{self.start.isoformat()}, {self.end.isoformat()})"


def chunks(wanted: TimeRange, span: dt.timedelta | None, done: Iterable[TimeRange]) -> list[TimeRange]:
    """Return the parts of a range that are not done, cut at multiples of `span` from the range's start.

    Args:
        wanted: the range.
        span: length of a chunk; None means no cuts.
        done: ranges that are done, in any order; they may overlap.

    Raises:
        ConfigError: there would be more than `MAX_CHUNKS` chunks.
    """
    if span is not None and (wanted.end - wanted.start) / span > MAX_CHUNKS:
        raise ConfigError(f"The range has more than {MAX_CHUNKS} chunks of {span}. Give a longer chunk.")
    result = []
    for gap in _subtract(wanted, done):
        start = gap.start
        while start < gap.end:
            end = gap.end
            if span is not None:
                num_before = (start - wanted.start) // span
                if (num_before + 1) * span < wanted.end - wanted.start:
                    end = min(end, wanted.start + (num_before + 1) * span)
            result.append(TimeRange(start, end))
            start = end
    return result


def parse_range(start: str | None, end: str | None) -> TimeRange | None:
    """Return a command's range, or None if neither time is given.

    Raises:
        ConfigError: only one of the times is given, or one is not an ISO 8601 instant.
    """
    if start is None and end is None:
        return None
    if start is None or end is None:
        raise ConfigError("Give both start and end; end itself is not in the range.")
    return TimeRange(parse_instant(start, name="start"), parse_instant(end, name="end"))


def parse_span(text: str | None) -> dt.timedelta | None:
    """Parse a time span such as `30d`, `12h` or `15m`.

    Raises:
        ConfigError: the text has another form.
    """
    if text is None:
        return None
    match = _SPAN.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"chunk must be a span such as 30d, 12h or 15m, got '{text}'.")
    try:
        return dt.timedelta(**{_UNITS[match[2]]: int(match[1])})
    except (OverflowError, ValueError) as error:
        raise ConfigError("chunk is longer than time spans can be. Leave it out for one batch.") from error


def _subtract(wanted: TimeRange, done: Iterable[TimeRange]) -> Iterable[TimeRange]:
    start = wanted.start
    for done_range in sorted(done):
        if done_range.start >= wanted.end:
            break
        if done_range.start > start:
            yield TimeRange(start, done_range.start)
        start = max(start, done_range.end)
    if start < wanted.end:
        yield TimeRange(start, wanted.end)


def parse_instant(text: str, *, name: str) -> dt.datetime:
    """Parse an ISO 8601 instant. A text without a time zone is UTC.

    Args:
        text: the instant.
        name: name of the setting, for the error message.

    Raises:
        ConfigError: the text is not an instant.
    """
    try:
        moment = dt.datetime.fromisoformat(text)
        return moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)
    except (ValueError, OverflowError) as error:
        raise ConfigError(
            f"{name} must be an ISO 8601 instant such as 2024-01-31 or 2024-01-31T00:00:00Z, got '{text}'."
        ) from error
