"""The instants of a cron expression in a time zone."""

from __future__ import annotations

import contextlib
import datetime as dt
import zoneinfo
from collections.abc import Iterator

from croniter import croniter
from croniter.croniter import CroniterBadDateError, CroniterError

from cluster.errors import ConfigError


def check_cron(expression: str, time_zone: str) -> None:
    """Require that an expression and a time zone are valid, and that the expression has a next instant.

    Raises:
        ConfigError: One of them is not. The message says which one and why.
    """
    try:
        zone = zoneinfo.ZoneInfo(time_zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigError(f"No time zone '{time_zone}'. Use an IANA name, such as 'Asia/Dubai'.") from error
    try:
        croniter(expression, dt.datetime.now(zone)).get_next(dt.datetime)
    except (CroniterError, ValueError, KeyError) as error:
        raise ConfigError(
            f"'{expression}' is not a cron expression that has a next time: {error}. Use five fields, such as "
            "'30 2 * * *' for half past two each night."
        ) from error


def slots_after(expression: str, time_zone: str, start: dt.datetime) -> Iterator[dt.datetime]:
    """Yield the instants after `start`, in UTC. They end if the expression has a field for the year.

    When clocks are set forward, a time that does not exist runs at the hour's end. When clocks are set back, a
    fixed hour runs once; an expression whose hour begins with `*` runs in both hours.
    """
    fields = expression.split()
    is_every_hour = fields[1].startswith("*") if len(fields) > 1 else expression == "@hourly"
    instants = croniter(expression, start.astimezone(zoneinfo.ZoneInfo(time_zone)))
    with contextlib.suppress(CroniterBadDateError):
        while True:
            instant = instants.get_next(dt.datetime)
            if not instant.fold or is_every_hour:
                yield instant.astimezone(dt.UTC)


def last_slot_before(expression: str, time_zone: str, end: dt.datetime) -> dt.datetime:
    """Return the last instant before `end`, in UTC, without a look at the instants before it.

    Raises:
        CroniterBadDateError: There is none.
    """
    instants = croniter(expression, end.astimezone(zoneinfo.ZoneInfo(time_zone)))
    return instants.get_prev(dt.datetime).astimezone(dt.UTC)
