"""The time of a look. A wrong clock of one machine must not end a rollout.

With PostgreSQL it is the database's time, so it does not matter which machine's controller acts. A look is skipped if
this time moved by some seconds more or less than the monotonic clock since the look before, for example because the
clock was set or the machine was suspended. A clock that stays wrong looks right from then on, so verdicts that depend
on time alone need several looks in a row (`controller`).
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable

import sqlalchemy as sa

from cluster.ledger.database import is_shared
from cluster.ledger.store import utc_now

MAX_JUMP_S = 5.0
"""Greatest difference of both clocks between two looks."""


def database_time(engine: sa.Engine) -> dt.datetime:
    """Return the time of PostgreSQL's machine. With SQLite there is only one machine, so it is this machine's time."""
    if not is_shared(engine):
        return utc_now()
    with engine.connect() as connection:
        now: dt.datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    return now.astimezone(dt.UTC)


class LookClock:
    """Gives the time of each look.

    Args:
        wall: Returns the time, in UTC.
        monotonic: Returns seconds of a clock that nobody sets.
    """

    def __init__(
        self, wall: Callable[[], dt.datetime], *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._offset_s: float | None = None

    def now(self) -> dt.datetime | None:
        """Return the time, or None if the clock has jumped since the last call.

        Raises:
            SQLAlchemyError: The database does not answer.
        """
        now = self._wall()
        offset_s = now.timestamp() - self._monotonic()
        before, self._offset_s = self._offset_s, offset_s
        return None if before is not None and abs(offset_s - before) > MAX_JUMP_S else now
