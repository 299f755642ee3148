"""Times as UTC microseconds: what a time without a zone means, and which way a finer time is rounded.

A time without a zone is UTC, unless the view's source declares a zone. Then it is what a clock in that zone showed.
When clocks go back, such a clock shows an hour twice; when they go forward, it skips an hour. In both cases the later
of the two possible instants counts: in the repeated hour the second pass, in the missing hour the offset from before
the change. So a training set never sees a row before it was true.

For the same reason the event and created times of rows are rounded up to the next microsecond, and the times of entity
rows are rounded down. A feature's own time is never rounded: it is exact, or it is refused.
"""

from __future__ import annotations

import datetime as dt
import difflib
import enum
import re
import zoneinfo
from collections.abc import Collection
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError
from feature_jobs.store.types.columns import with_replaced

TIME = pa.timestamp("us", "UTC")
_EPOCH = dt.datetime(1970, 1, 1)
_CLOCKS = (dt.datetime(1, 1, 3), dt.datetime(9999, 12, 29))
"""Times of day that Python reaches in every zone. Others stay as if they were UTC; no batch stores them."""
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_FINER = re.compile(r"[.,]\d{6}(\d+)")
FINER_TEXT = r"[.,]\d{6}\d*[1-9]"
"""Of text: a fraction of a second that microseconds do not hold."""


class Rounding(enum.Enum):
    """What becomes of a time that is finer than microseconds."""

    up = "up"
    """Of events and their creation."""
    down = "down"
    """Of entity rows."""
    exact = "exact"
    """It is refused."""


def check_zone(zone: str | None, what: str) -> None:
    """Refuse a zone that is not in the IANA time zone database.

    Raises:
        DefinitionError: naming it.
    """
    if zone is None:
        return
    try:
        zoneinfo.ZoneInfo(zone)
        _utc(pl.Series([_EPOCH]), zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError, pl.exceptions.PolarsError) as error:
        alike = difflib.get_close_matches(zone, zoneinfo.available_timezones(), n=1)
        guess = f"did you mean '{alike[0]}'?" if alike else "give a name such as America/Los_Angeles."
        raise DefinitionError(f"{what}: unknown zone '{zone}'; {guess}") from error


def micros(column: pa.ChunkedArray, rounding: Rounding) -> pa.ChunkedArray:
    """A timestamp column in microseconds; a time that they cannot reach becomes the nearest that they can.

    Args:
        column: of any unit; its zone stays.
        rounding: of nanoseconds.

    Raises:
        ArrowInvalid: with `exact`, a time is finer than microseconds.
    """
    unit, kind = column.type.unit, pa.timestamp("us", column.type.tz)
    if unit == "us":
        return column
    numbers = column.cast(pa.int64())
    if unit == "ns":
        whole = pc.divide(numbers, 1000)  # towards zero
        rest = pc.subtract(numbers, pc.multiply(whole, 1000))
        if rounding is Rounding.exact and pc.any(pc.not_equal(rest, 0), min_count=0).as_py():
            raise pa.ArrowInvalid("a time is finer than microseconds")
        if rounding is Rounding.up:
            return pc.add(whole, pc.greater(rest, 0).cast(pa.int64())).cast(kind)
        return pc.subtract(whole, pc.less(rest, 0).cast(pa.int64())).cast(kind)
    factor = 10**6 // _PER_SECOND[unit]
    most = (2**63 - 1) // factor
    inside = pc.min_element_wise(
        pc.max_element_wise(numbers, -most, skip_nulls=False), most, skip_nulls=False
    )
    return pc.multiply(inside, factor).cast(kind)


def in_zone(column: pa.ChunkedArray, zone: str | None) -> pa.ChunkedArray:
    """A timestamp column as UTC, in its own unit; only times without a zone are read in the given one."""
    utc = pa.timestamp(column.type.unit, "UTC")
    if column.type.tz is not None or zone is None:
        return column.cast(utc)
    local = pl.Series(pl.from_arrow(micros(column, Rounding.down)))
    readable = pl.select(pl.when(local.is_between(*_CLOCKS)).then(local)).to_series()
    shift = pl.Series(_utc(readable, zone).dt.epoch("us") - readable.dt.epoch("us")).fill_null(0).to_arrow()
    per_second = _PER_SECOND[column.type.unit]
    moved = pc.divide(shift, 10**6 // per_second) if per_second < 10**6 else shift
    moved = pc.multiply(moved, per_second // 10**6) if per_second > 10**6 else moved
    numbers = pc.add_checked(column.cast(pa.int64()), moved)
    return pa.chunked_array([numbers] if isinstance(numbers, pa.Array) else numbers.chunks, pa.int64()).cast(
        utc
    )


def zoned(table: pa.Table, zone: str | None, times: Collection[str]) -> pa.Table:
    """A source's rows with their times without a zone read in a zone.

    Args:
        table: as the source has them.
        zone: None leaves them as they are.
        times: columns that hold times; a date there is the beginning of its day.
    """
    if zone is None:
        return table
    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if field.name in times and pa.types.is_date(field.type):
            column = days(column)
        if pa.types.is_timestamp(column.type) and column.type.tz is None:
            columns[field.name] = in_zone(column, zone)
    return with_replaced(table, columns)


def days(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dates as the beginning of their day, without a zone."""
    return column.cast(pa.date64()).cast(pa.timestamp("ms"))


def instant(value: dt.datetime, zone: str | None) -> dt.datetime:
    """A Python time as UTC; one without a zone is read in the given one.

    Raises:
        OverflowError: it is beyond Python's years.
    """
    if value.tzinfo is not None:
        return value.astimezone(dt.UTC)
    if zone is None:
        return value.replace(tzinfo=dt.UTC)
    local = value.replace(tzinfo=zoneinfo.ZoneInfo(zone))
    # Of a repeated hour fold=1 is the later one, of a missing hour fold=0.
    return max(local.replace(fold=fold).astimezone(dt.UTC) for fold in (0, 1))


def parse(text: Any, zone: str | None, rounding: Rounding) -> dt.datetime | None:
    """An instant from ISO 8601 text; None where it is none, or cannot be held."""
    if not isinstance(text, str):
        return None
    try:
        moment = instant(dt.datetime.fromisoformat(text), zone)
        finer = _FINER.search(text)
        if finer is None or not finer[1].strip("0") or rounding is Rounding.down:
            return moment
        return moment + dt.timedelta(microseconds=1) if rounding is Rounding.up else None
    except (ValueError, OverflowError):
        return None


def _utc(local: pl.Series, zone: str) -> pl.Series:
    """Times of a clock in a zone as UTC."""
    utc = local.dt.replace_time_zone(zone, ambiguous="latest", non_existent="null").dt.convert_time_zone(
        "UTC"
    )
    missing = np.flatnonzero((utc.is_null() & local.is_not_null()).to_numpy())
    if missing.size == 0:
        return utc
    shown = local.gather(missing).to_list()
    known = {one: instant(one, zone) for one in set(shown)}
    found = pl.Series([known[one] for one in shown], dtype=utc.dtype)
    return utc.scatter(missing, found)
