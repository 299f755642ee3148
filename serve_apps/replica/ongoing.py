"""Mean number of a replica's concurrent requests, including those that wait in front of it.

Counting periodically within the event loop sees no request (see `scaling.py`). The mean over an interval needs no
counting: it is the seconds that requests spent, divided by the seconds that passed (Little 1961). The edge sends a
request's arrival time in a header; both clocks are the node's.
"""

from __future__ import annotations

from collections.abc import Callable
from time import time


class OngoingRequests:
    """A mean that starts again each time it is taken.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time) -> None:
        self._clock = clock
        self._since = clock()
        self._seconds = 0.0

    def add(self, *, arrived: str | None, took_s: float) -> None:
        """Count a request that was just answered.

        Args:
            arrived: the edge's header with the arrival time; empty or None for a request without it.
            took_s: seconds within the replica; the minimum, if the clock was changed or there is no header.
        """
        now = self._clock()
        elapsed_s = now - int(arrived) / 1e6 if arrived and arrived.isdecimal() else took_s
        # Only the time since the mean was last taken counts. Waiting for this replica's start says nothing about its
        # load, and a body that took an hour to arrive is one request, not a thousand.
        self._seconds += min(max(took_s, elapsed_s), max(now - self._since, 0.0))

    def take(self) -> float:
        """Return the mean since the last call, and start again."""
        now = self._clock()
        mean = self._seconds / max(now - self._since, 1e-3)
        self._since, self._seconds = now, 0.0
        return mean
