"""How far a row's times may lie ahead of the clock.

A row that says it is true tomorrow would hide today's value online, where an entity has one row. Offline, today's value
goes on counting. So such a row goes to quarantine, however it comes. Clocks differ a little, which is allowed for.

A creation that only follows from a view's `created_lag` is nobody's stamp. A batch from a file or database may have it
ahead: its rows go online by a materialisation, which takes what is known by then. A pushed or streamed row goes online
at once, so it may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.store.types.schema import CREATED, EVENT


@dataclass(frozen=True, kw_only=True, slots=True)
class Ahead:
    """What is allowed."""

    limit: timedelta = timedelta(seconds=60)
    online_at_once: bool = False
    """Whether the rows go online as they come."""

    @classmethod
    def of(cls, max_ahead_s: float, *, online_at_once: bool = False) -> Ahead:
        """From the setting `features.max_ahead_s`."""
        return cls(limit=timedelta(seconds=max_ahead_s), online_at_once=online_at_once)

    def failing(self, name: str, table: pa.Table, latest: pa.Scalar, lag: timedelta) -> pa.ChunkedArray:
        """Which rows have a time that lies too far ahead; one non-null bool a row.

        Args:
            name: of the time's column.
            table: validated rows.
            latest: the latest time that is allowed.
            lag: the view's `created_lag`.
        """
        beyond = pc.greater(table[name], latest)
        if name == CREATED and not self.online_at_once:
            stamped = pc.not_equal(table[CREATED], pc.add(table[EVENT], pa.scalar(lag, pa.duration("us"))))
            beyond = pc.and_(beyond, stamped)
        return pc.fill_null(beyond, False)
