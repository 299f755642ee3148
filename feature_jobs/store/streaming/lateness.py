"""Find the rows of a stream that are too late, for each partition separately.

The watermark of a partition is the greatest event time so far of its rows that passed the checks, so a wrong clock does
not move it. It depends only on the order of the rows within the partition, not on how they were batched. So a stream
finds the same late rows, whether it was killed and restarted or not.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

BEGINNING = -(2**62)
"""Watermark before the first row, in microseconds."""


class LatePolicy(enum.Enum):
    """What happens to a late row."""

    accept = "accept"
    """It is stored and counted. Point-in-time joins stay right, because its created time says when it was known."""
    quarantine = "quarantine"
    """It goes to quarantine and is counted."""


@dataclass(frozen=True, slots=True)
class Lateness:
    """How late a row may be, and what happens to later rows."""

    max_us: int | None
    """Greatest allowed distance behind the partition's watermark in microseconds; None for no limit."""
    policy: LatePolicy

    def find_late(self, event_us: Iterable[int], watermark_us: int) -> tuple[list[bool], int]:
        """Return which rows of one partition are late, and the watermark after them.

        Args:
            event_us: event times of the partition's good rows, in order.
            watermark_us: watermark before these rows.
        """
        late = []
        for event in event_us:
            late.append(self.max_us is not None and event < watermark_us - self.max_us)
            watermark_us = max(watermark_us, event)
        return late, watermark_us
