"""Batches of rows for a rank: its part of each global batch, from any position in an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.runtime.encoding import Matrix
from jobs.train.rows.encoded import EncodedRows, GroupCache, Part
from jobs.train.rows.order import WINDOW_ROWS, Window, windows_of
from jobs.train.rows.target import Target

EVALUATION_ROWS = 4096
"""Rows of a batch in which a model is evaluated."""

VALIDATION_BYTES = 16 * 2**20
"""A worker keeps validation rows up to this size."""


class Batch(NamedTuple):
    """Rows for one forward pass."""

    matrix: Matrix
    target: Target


class RowReader:
    """Reads the batches of one rank. It holds two windows of rows, a bounded cache, and some validation rows."""

    def __init__(self, rows: EncodedRows, *, seed: int, window_rows: int = WINDOW_ROWS) -> None:
        self._rows, self._cache = rows, GroupCache(rows)
        self._seed, self._window_rows = seed, window_rows
        self._fit_counts = rows.counts(Part.fit)
        self._validation: dict[int, Batch] = {}
        self._validation_room = VALIDATION_BYTES

    def batches(self, epoch: int, *, first_step: int, steps: int, batch_rows: int) -> Iterator[Batch]:
        """Yield the global batches of the steps `first_step` to `steps` of an epoch.

        The rows of a step are the same for every number of workers and for every first step.
        """
        windows = windows_of(self._fit_counts, seed=self._seed, epoch=epoch, window_rows=self._window_rows)
        position, end = first_step * batch_rows, steps * batch_rows
        held: list[Batch] = []
        num_held = 0
        needed = [window for window in windows if window.end > position and window.start < end]
        for window, shuffled in self._prefetched(needed):
            while position < min(window.end, end):
                begin = position - window.start
                taken = min(batch_rows - num_held, window.rows - begin)
                rows = slice(begin, begin + taken)
                held.append(Batch(shuffled.matrix[rows], shuffled.target[rows]))
                num_held, position = num_held + taken, position + taken
                if num_held == batch_rows:
                    yield _join(held)
                    held, num_held = [], 0

    def validation(self, *, rank: int, workers: int) -> Iterator[Batch]:
        """Yield the validation rows of the groups that belong to this rank."""
        for group, count in enumerate(self._rows.counts(Part.validation)):
            if group % workers != rank or not count:
                continue
            chosen = self._validation_rows(group)
            for begin in range(0, count, EVALUATION_ROWS):
                rows = slice(begin, begin + EVALUATION_ROWS)
                yield Batch(chosen.matrix[rows], chosen.target[rows])

    def _validation_rows(self, group: int) -> Batch:
        """Return the validation rows of a group. They are kept, if there is room, so each epoch need not read them."""
        kept = self._validation.get(group)
        if kept is not None:
            return kept
        chosen = self._cache.read(group).of(Part.validation)
        batch = Batch(chosen.matrix, chosen.target)
        size = batch.matrix.nbytes + batch.target.nbytes
        if size <= self._validation_room:
            self._validation[group] = batch
            self._validation_room -= size
        return batch

    def validation_steps(self, *, workers: int) -> int:
        """Return the largest number of validation batches of a rank."""
        counts = self._rows.counts(Part.validation)
        by_rank = [
            sum(-(-count // EVALUATION_ROWS) for count in counts[rank::workers]) for rank in range(workers)
        ]
        return max(by_rank)

    def any_batch(self) -> Batch:
        """Return a batch whose values do not matter."""
        group = next(group for group, count in enumerate(self._rows.counts(Part.validation)) if count)
        chosen = self._cache.read(group).of(Part.validation)
        return Batch(chosen.matrix[:1], chosen.target[:1])

    def _prefetched(self, windows: list[Window]) -> Iterator[tuple[Window, Batch]]:
        """Yield the rows of each window. A thread reads the next window meanwhile, so two windows are in memory."""
        with ThreadPoolExecutor(1, "rows") as thread:
            coming = [thread.submit(self._shuffled, window) for window in windows[:1]]
            for index, window in enumerate(windows):
                shuffled = coming.pop().result()
                coming = [thread.submit(self._shuffled, after) for after in windows[index + 1 : index + 2]]
                yield window, shuffled

    def _shuffled(self, window: Window) -> Batch:
        groups = [self._cache.read(group).of(Part.fit) for group in window.groups]
        order = window.order()
        matrix = np.concatenate([group.matrix for group in groups])
        return Batch(matrix[order], np.concatenate([group.target for group in groups])[order])


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(
        np.concatenate([batch.matrix for batch in batches]),
        np.concatenate([batch.target for batch in batches]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TableBatches:
    """The batches of a training set, as plain data for workers."""

    rows: EncodedRows

    def reader(self, *, seed: int) -> RowReader:
        """Return a reader for one worker."""
        return RowReader(self.rows, seed=seed)
