"""When a part may be tried again: at once, then after ever longer waits, so that one that cannot start costs little."""

from __future__ import annotations

FIRST_S, LONGEST_S = 1.0, 60.0
WELL_S = 60.0
"""A part that has run for so long counts as well, and its next death as its first."""


class Backoff:
    """Of one part; every time is monotonic.

    Args:
        longest_s: the longest wait between two tries.
    """

    def __init__(self, longest_s: float = LONGEST_S) -> None:
        self._longest_s = longest_s
        self.attempts = 0
        self._tried_at = 0.0

    def may_try(self, now: float) -> bool:
        """Whether enough time has passed since the last try."""
        return not self.attempts or now >= self._tried_at + min(
            self._longest_s, FIRST_S * 2 ** (self.attempts - 1)
        )

    def tried(self, now: float) -> None:
        """It was started."""
        self.attempts += 1
        self._tried_at = now

    def runs(self, now: float) -> None:
        """It was seen running."""
        if now >= self._tried_at + WELL_S:
            self.attempts = 0

    def forget(self) -> None:
        """Let it be tried at once."""
        self.attempts = 0
