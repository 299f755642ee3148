"""Wait for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.1


def wait_until(condition: Callable[[], bool], what: str = "the condition", *, seconds: float = 10) -> None:
    """Poll until a condition is true. Fail after a deadline. The pauses become longer, because a check may be slow."""
    deadline, pause_s = time.monotonic() + seconds, FIRST_PAUSE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} never became true"
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
