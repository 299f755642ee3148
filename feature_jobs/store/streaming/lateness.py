"""Which rows of a stream come too late, told partition by partition.

A partition's watermark is the greatest event time so far of its rows that passed the checks, so that a mistaken clock
moves nothing. It depends on the order within the partition alone, not on how the rows were batched; a stream that was
killed tells the same rows late as one that was not.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

BEGINNING = -(2**62)
"""Before every event."""


class LatePolicy(enum.Enum):
    """What becomes of a late row."""

    accept = "accept"
    """It is stored and counted. Point-in-time reads are right all the same, as it says when it was known."""
    quarantine = "quarantine"


@dataclass(frozen=True, slots=True)
class Lateness:
    """How far behind a partition's watermark a row may be, in microseconds; none is any distance."""

    max_us: int | None
    policy: LatePolicy

    def judge(self, event_us: Iterable[int], watermark_us: int) -> tuple[list[bool], int]:
        """Of one partition's good rows, in order: which are late, and the watermark behind them."""
        late = []
        for event in event_us:
            late.append(self.max_us is not None and event < watermark_us - self.max_us)
            watermark_us = max(watermark_us, event)
        return late, watermark_us
