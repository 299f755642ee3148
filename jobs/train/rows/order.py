"""The order of rows in training. It depends on the seed, the epoch and the position, never on the number of workers.

An epoch reads the row groups in a random order. Some groups together are a window, and the rows of a window are
shuffled together. So a worker holds one window, not all rows. Two rows of groups that are far apart in the file may
still follow each other, because the order of the groups is random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW_ROWS = 131_072
"""A window has at least this many rows, if there are so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Row groups whose rows are shuffled together."""

    groups: tuple[int, ...]
    start: int
    """Position of the first row in the epoch."""
    rows: int
    seed: tuple[int, ...]
    """Seed of the order of the rows."""

    @property
    def end(self) -> int:
        """Position behind the last row."""
        return self.start + self.rows

    def order(self) -> npt.NDArray[np.int64]:
        """Return the order of the rows: indices into the rows of all groups, one group after another."""
        return np.random.default_rng(self.seed).permutation(self.rows)


def windows_of(
    group_rows: Sequence[int], *, seed: int, epoch: int, window_rows: int = WINDOW_ROWS
) -> list[Window]:
    """Return the windows of one epoch in order.

    Args:
        group_rows: Number of rows to train on in each row group.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        window_rows: Smallest number of rows of a window, except of the last one.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(group_rows))
    windows: list[Window] = []
    groups: list[int] = []
    start = rows = 0
    for index, group in enumerate(map(int, order)):
        groups.append(group)
        rows += group_rows[group]
        if rows >= window_rows or index == len(order) - 1:
            seeds = (seed, epoch, len(windows))
            windows.append(Window(groups=tuple(groups), start=start, rows=rows, seed=seeds))
            groups, start, rows = [], start + rows, 0
    return [window for window in windows if window.rows]
