"""How many requests a replica has at once, those included that wait in front of it.

A count taken now and then from within the event loop sees none of them (see `scaling.py`). The mean over a
time is exact without looking: the seconds that requests spent, over the seconds that passed (Little 1961). When a
request arrived, the edge says in a header; both clocks are the node's.
"""

from __future__ import annotations

from collections.abc import Callable
from time import time


class OngoingRequests:
    """A running mean, begun anew each time it is taken.

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
            arrived: what the edge said; nothing for a request that came past it.
            took_s: within the replica; where a clock went astray or nothing was said, this counts.
        """
        now = self._clock()
        waited = now - int(arrived) / 1e6 if arrived and arrived.isdecimal() else took_s
        # Of what began earlier only the part since then is counted: a wait for this replica's start tells nothing of
        # its load, and one body that took an hour to come is one request, not a thousand.
        self._seconds += min(max(took_s, waited), max(now - self._since, 0.0))

    def take(self) -> float:
        """Mean number since it was last taken."""
        now = self._clock()
        mean = self._seconds / max(now - self._since, 1e-3)
        self._since, self._seconds = now, 0.0
        return mean
