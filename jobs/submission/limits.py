"""How often, and how often at the same time, each caller may do something."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque

from jobs.submission.errors import TooManyJobs

MAX_REFUSED = 30
"""A caller may have at most this many refused requests in `PERIOD_S`. Further requests get 429 and add no event. This
protects the ledger and the service from a caller that repeats a wrong request."""
MAX_NEW = 60
"""A caller may submit at most this many new jobs in `PERIOD_S`. Further requests get 429. Each job adds up to four
events to the ledger, also if it is stopped at once."""
PERIOD_S = 60.0


class Frequency:
    """Counts what each caller does in `PERIOD_S`. It is thread-safe.

    Args:
        most: largest number for a caller.
        of_what: what is counted, for the message.
    """

    def __init__(self, most: int, *, of_what: str) -> None:
        self._most = most
        self._of_what = of_what
        self._times: defaultdict[str, deque[float]] = defaultdict(deque)
        self._lock = threading.Lock()

    def require_room(self, subject: str, *, now: float) -> None:
        """Require that a caller may do it once more.

        Raises:
            TooManyJobs: The caller did it too often.
        """
        with self._lock:
            recent = self._times[subject]
            while recent and not now - PERIOD_S <= recent[0] <= now:  # later: the clock was set back
                recent.popleft()
            if len(recent) >= self._most:
                raise TooManyJobs(f"{self._most} {self._of_what} in {PERIOD_S:.0f} s. Try again later.")
            if not recent:
                del self._times[subject]

    def count(self, subject: str, *, now: float) -> None:
        """Count that a caller did it now."""
        with self._lock:
            self._times[subject].append(now)

    def total(self) -> int:
        """Return how often all callers did it."""
        with self._lock:
            return sum(map(len, self._times.values()))


class InProgress:
    """Counts the requests of each caller that are in progress. Use it in one thread, such as that of an event loop.

    Args:
        most: largest number for a caller.
        most_of_all: largest number for all callers together.
        of_what: what is counted, for the message.
    """

    def __init__(self, most: int, *, most_of_all: int, of_what: str) -> None:
        self._most = most
        self._most_of_all = most_of_all
        self._of_what = of_what
        self._counts: Counter[str] = Counter()

    def begin(self, subject: str) -> None:
        """Count a request.

        Raises:
            TooManyJobs: The caller, or all callers together, have too many in progress.
        """
        if self._counts[subject] >= self._most:
            raise TooManyJobs(
                f"You have {self._most} {self._of_what} in progress. Wait for one, or close one."
            )
        if self._counts.total() >= self._most_of_all:
            raise TooManyJobs(f"Too many {self._of_what} are in progress. Try again.")
        self._counts[subject] += 1

    def end(self, subject: str) -> None:
        """Count that a request has ended."""
        self._counts[subject] -= 1
        self._counts += Counter()  # without the callers that have none
