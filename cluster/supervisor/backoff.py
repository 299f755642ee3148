"""Backoff between restarts of a part. The first try is immediate, then the waits grow.

So there are only few tries for a part that cannot start.
"""

from __future__ import annotations

FIRST_S, LONGEST_S = 1.0, 60.0
HEALTHY_S = 60.0
"""Seconds that a part must run before its count of attempts is reset."""


class Backoff:
    """Exponential backoff for one part. All times are monotonic seconds.

    Args:
        longest_s: Longest wait between two tries, in seconds.
    """

    def __init__(self, longest_s: float = LONGEST_S) -> None:
        self._longest_s = longest_s
        self.attempts = 0
        self._tried_at = 0.0

    def may_try(self, now: float) -> bool:
        """Return whether enough time has passed since the last try."""
        return not self.attempts or now >= self._tried_at + min(
            self._longest_s, FIRST_S * 2 ** (self.attempts - 1)
        )

    def record_try(self, now: float) -> None:
        """Count one try."""
        self.attempts += 1
        self._tried_at = now

    def record_running(self, now: float) -> None:
        """Reset the count if the part has been running for `HEALTHY_S` seconds since the last try."""
        if now >= self._tried_at + HEALTHY_S:
            self.attempts = 0

    def reset(self) -> None:
        """Allow the next try at once."""
        self.attempts = 0
