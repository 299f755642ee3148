"""Limit on how far a row's times may be ahead of the clock.

The online store has one row per entity. A row with tomorrow's time would replace today's value there, but an offline
join would still use today's value. So such a row goes to quarantine, whatever its source is. Small clock differences
are allowed.

A created time that is only computed as event time + the view's `created_lag` is a special case. In a file or a database
it may be in the future: such rows go online by a materialisation, which leaves out rows that are not known yet. A
pushed or streamed row goes online at once, so its created time may not be in the future.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.store.types.schema import CREATED, EVENT


@dataclass(frozen=True, kw_only=True, slots=True)
class FutureLimit:
    """How far event and created times may be ahead of the clock."""

    limit: timedelta = timedelta(seconds=60)
    online_at_once: bool = False
    """True if the rows go online as soon as they arrive."""

    @classmethod
    def of(cls, max_ahead_s: float, *, online_at_once: bool = False) -> FutureLimit:
        """Return the limit for the setting `features.max_ahead_s`."""
        return cls(limit=timedelta(seconds=max_ahead_s), online_at_once=online_at_once)

    def failing_mask(self, name: str, table: pa.Table, latest: pa.Scalar, lag: timedelta) -> pa.ChunkedArray:
        """Return one non-null bool per row: true if the row's time is too far ahead.

        Args:
            name: name of the time column.
            table: validated rows.
            latest: the latest time that is allowed.
            lag: the view's `created_lag`.
        """
        beyond = pc.greater(table[name], latest)
        if name == CREATED and not self.online_at_once:
            set_by_source = pc.not_equal(
                table[CREATED], pc.add(table[EVENT], pa.scalar(lag, pa.duration("us")))
            )
            beyond = pc.and_(beyond, set_by_source)
        return pc.fill_null(beyond, False)
