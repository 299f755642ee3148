"""Mean number of a replica's concurrent requests, including requests that wait for the replica.

Periodic counts within the event loop would always be zero (see `scaling.py`). The mean over an interval can be computed
without counting: it is the sum of the requests' durations, divided by the length of the interval (Little 1961). The
edge sends the arrival time of a request in a header. Edge and replica use the same clock, that of the node.
"""

from __future__ import annotations

from collections.abc import Callable
from time import time


class OngoingRequests:
    """Mean number of concurrent requests since the last call of `take`.

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
            arrived: the edge's header with the arrival time. Empty or None if the request does not have the header.
            took_s: seconds within the replica. Used as the duration if the header is missing, or gives a shorter time
                because the clock was changed.
        """
        now = self._clock()
        elapsed_s = now - int(arrived) / 1e6 if arrived and arrived.isdecimal() else took_s
        # A request counts at most for the time since the last `take`. Waiting for this replica's start says nothing
        # about its load, and a body that took an hour to arrive is one request, not a thousand.
        self._seconds += min(max(took_s, elapsed_s), max(now - self._since, 0.0))

    def take(self) -> float:
        """Return the mean since the last call, and start again."""
        now = self._clock()
        mean = self._seconds / max(now - self._since, 1e-3)
        self._since, self._seconds = now, 0.0
        return mean
