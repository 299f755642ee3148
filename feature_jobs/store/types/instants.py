"""Times as UTC microseconds: rules for times without a zone and for times finer than a microsecond.

A time without a zone is UTC, unless the view's source declares a zone. Then it is local time in that zone. When clocks
go back, one hour of local time occurs twice. When clocks go forward, one hour does not occur. In both cases the later
of the two possible instants is used: the second occurrence of a repeated hour, and the old UTC offset for a missing
hour. So a training set never contains a row before it was true.

For the same reason event times and created times of rows are rounded up to the next microsecond, and times of entity
rows are rounded down. A feature of dtype timestamp is never rounded: a finer time is refused.
"""

from __future__ import annotations

import datetime as dt
import difflib
import enum
import re
import zoneinfo
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError
from feature_jobs.store.types.columns import replace_columns

if TYPE_CHECKING:
    import polars as pl

TIME = pa.timestamp("us", "UTC")
_EPOCH = dt.datetime(1970, 1, 1)
_CONVERTIBLE = (dt.datetime(1, 1, 3), dt.datetime(9999, 12, 29))
"""Local times that Python can convert to UTC in every zone. Other times are treated as UTC; no batch stores them.
"""
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_FINER = re.compile(r"[.,]\d{6}(\d+)")
FINER_TEXT = r"[.,]\d{6}\d*[1-9]"
"""Pattern of a fraction of a second, in text, that is finer than a microsecond."""


class Rounding(enum.Enum):
    """How to round a time that is finer than a microsecond."""

    up = "up"
    """For event times and created times."""
    down = "down"
    """For times of entity rows."""
    exact = "exact"
    """The time is refused."""


def validate_zone(zone: str | None, owner: str) -> None:
    """Validate that a zone is in the IANA time zone database.

    Args:
        zone: The zone's name. None is valid.
        owner: The source that declares it, for the message.

    Raises:
        DefinitionError: The zone is unknown.
    """
    if zone is None:
        return
    import polars as pl

    try:
        zoneinfo.ZoneInfo(zone)
        _utc(pl.Series([_EPOCH]), zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError, pl.exceptions.PolarsError) as error:
        similar = difflib.get_close_matches(zone, zoneinfo.available_timezones(), n=1)
        hint = f"did you mean '{similar[0]}'?" if similar else "give a name such as America/Los_Angeles."
        raise DefinitionError(f"{owner}: unknown zone '{zone}'; {hint}") from error


def to_micros(column: pa.ChunkedArray, rounding: Rounding) -> pa.ChunkedArray:
    """Convert a timestamp column to microseconds.

    A time outside the range of microseconds becomes the nearest time in the range.

    Args:
        column: Timestamps of any unit. Their zone stays.
        rounding: How to round nanoseconds.

    Raises:
        ArrowInvalid: `rounding` is exact and a time is finer than a microsecond.
    """
    unit, target = column.type.unit, pa.timestamp("us", column.type.tz)
    if unit == "us":
        return column
    numbers = column.cast(pa.int64())
    if unit == "ns":
        whole = pc.divide(numbers, 1000)  # rounds towards zero
        remainder = pc.subtract(numbers, pc.multiply(whole, 1000))
        if rounding is Rounding.exact and pc.any(pc.not_equal(remainder, 0), min_count=0).as_py():
            raise pa.ArrowInvalid("a time is finer than microseconds")
        if rounding is Rounding.up:
            return pc.add(whole, pc.greater(remainder, 0).cast(pa.int64())).cast(target)
        return pc.subtract(whole, pc.less(remainder, 0).cast(pa.int64())).cast(target)
    factor = 10**6 // _PER_SECOND[unit]
    limit = (2**63 - 1) // factor
    clamped = pc.min_element_wise(
        pc.max_element_wise(numbers, -limit, skip_nulls=False), limit, skip_nulls=False
    )
    return pc.multiply(clamped, factor).cast(target)


def column_to_utc(column: pa.ChunkedArray, zone: str | None) -> pa.ChunkedArray:
    """Convert a timestamp column to UTC. The unit stays.

    Args:
        column: Timestamps. If they have a zone, `zone` has no effect.
        zone: The zone of times that have none. None means UTC.
    """
    utc = pa.timestamp(column.type.unit, "UTC")
    if column.type.tz is not None or zone is None:
        return column.cast(utc)
    import polars as pl

    local = pl.Series(pl.from_arrow(to_micros(column, Rounding.down)))
    convertible = pl.select(pl.when(local.is_between(*_CONVERTIBLE)).then(local)).to_series()
    shift_us = pl.Series(_utc(convertible, zone).dt.epoch("us") - convertible.dt.epoch("us"))
    shift = shift_us.fill_null(0).to_arrow()
    per_second = _PER_SECOND[column.type.unit]
    if per_second < 10**6:
        shift = pc.divide(shift, 10**6 // per_second)
    elif per_second > 10**6:
        shift = pc.multiply(shift, per_second // 10**6)
    numbers = pc.add_checked(column.cast(pa.int64()), shift)
    chunks = [numbers] if isinstance(numbers, pa.Array) else numbers.chunks
    return pa.chunked_array(chunks, pa.int64()).cast(utc)


def table_to_utc(table: pa.Table, zone: str | None, times: Collection[str]) -> pa.Table:
    """Convert a source's times without a zone to UTC.

    Args:
        table: The source's rows.
        zone: The zone of these times. None leaves the table unchanged.
        times: Names of the columns with times. A date means the beginning of this day.
    """
    if zone is None:
        return table
    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if field.name in times and pa.types.is_date(field.type):
            column = start_of_days(column)
        if pa.types.is_timestamp(column.type) and column.type.tz is None:
            columns[field.name] = column_to_utc(column, zone)
    return replace_columns(table, columns)


def start_of_days(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert dates to timestamps at the beginning of the day, without a zone."""
    return column.cast(pa.date64()).cast(pa.timestamp("ms"))


def utc_instant(value: dt.datetime, zone: str | None) -> dt.datetime:
    """Convert a Python time to UTC.

    Args:
        value: The time.
        zone: The zone of a time that has none. None means UTC.

    Raises:
        OverflowError: The result is outside the years 1 to 9999.
    """
    if value.tzinfo is not None:
        return value.astimezone(dt.UTC)
    if zone is None:
        return value.replace(tzinfo=dt.UTC)
    local = value.replace(tzinfo=zoneinfo.ZoneInfo(zone))
    # The later instant is fold=1 for a repeated hour, and fold=0 for a missing hour.
    return max(local.replace(fold=fold).astimezone(dt.UTC) for fold in (0, 1))


def parse_instant(text: Any, zone: str | None, rounding: Rounding) -> dt.datetime | None:
    """Parse ISO 8601 text as an instant in UTC.

    Returns:
        The instant. None if `text` is not ISO 8601 text, is outside the years 1 to 9999, or needs rounding although
        `rounding` is exact.
    """
    if not isinstance(text, str):
        return None
    try:
        parsed = utc_instant(dt.datetime.fromisoformat(text), zone)
        finer = _FINER.search(text)
        if finer is None or not finer[1].strip("0") or rounding is Rounding.down:
            return parsed
        return parsed + dt.timedelta(microseconds=1) if rounding is Rounding.up else None
    except (ValueError, OverflowError):
        return None


def _utc(local: pl.Series, zone: str) -> pl.Series:
    """Convert local times in a zone to UTC."""
    zoned_times = local.dt.replace_time_zone(zone, ambiguous="latest", non_existent="null")
    utc = zoned_times.dt.convert_time_zone("UTC")
    non_existent = np.flatnonzero((utc.is_null() & local.is_not_null()).to_numpy())
    if non_existent.size == 0:
        return utc
    import polars as pl

    local_times = local.gather(non_existent).to_list()
    instants = {time: utc_instant(time, zone) for time in set(local_times)}
    return utc.scatter(non_existent, pl.Series([instants[time] for time in local_times], dtype=utc.dtype))
