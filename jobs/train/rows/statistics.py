"""Statistics of the rows to fit on, from one pass over the row groups. Checks and networks use them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.runtime.encoding import Matrix
from jobs.train.rows.encoded import EncodedGroup, Part

SAMPLE = 20_000
"""The search for leaks uses at most this many rows."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Statistics of the rows to fit on. Arrays have one element for each matrix column."""

    means: Floats
    """Mean without missing values; 0 for a column without values."""
    spreads: Floats
    """Standard deviation without missing values; 0 for a column without values."""
    is_empty: npt.NDArray[np.bool_]
    """Whether the column has no value."""
    is_constant: npt.NDArray[np.bool_]
    """Whether all rows have the same value."""
    column_digests: list[str]
    """Hash of each column's values."""
    sample: Matrix
    """Some rows, in their order."""
    sample_target: npt.NDArray[Any]
    digests: tuple[str, ...]
    """Hash of each row group, of all its rows."""


def sample_positions(fit: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the positions of the sampled rows among the rows to fit on, in ascending order."""
    num_rows = int(fit.sum())
    if num_rows <= SAMPLE:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(0).choice(num_rows, SAMPLE, replace=False))


def measure(groups: Iterable[EncodedGroup], *, fit: npt.NDArray[np.bool_], width: int) -> Statistics:
    """Return the statistics of the rows to fit on.

    Args:
        groups: All row groups in order.
        fit: Mask of the rows to fit on.
        width: Number of matrix columns.
    """
    moments = _Moments(width)
    hashes = [hashlib.blake2b(digest_size=16) for _ in range(width)]
    positions, seen = sample_positions(fit), 0
    first: Matrix | None = None
    is_constant = np.ones(width, dtype=np.bool_)
    samples, targets, digests = [], [], []
    for group in groups:
        digests.append(group.digest)
        chosen = group.of(Part.fit)
        count = len(chosen.matrix)
        if not count:
            continue
        first = chosen.matrix[0] if first is None else first
        is_constant &= (chosen.matrix == first).all(axis=0)
        moments.add(chosen.matrix)
        for column, content in enumerate(hashes):
            content.update(np.ascontiguousarray(chosen.matrix[:, column]).data)
        rows = positions[(positions >= seen) & (positions < seen + count)] - seen
        samples.append(chosen.matrix[rows])
        targets.append(chosen.target[rows])
        seen += count
    return Statistics(
        means=moments.means,
        spreads=moments.spreads(),
        is_empty=moments.counts == 0,
        is_constant=is_constant,
        column_digests=[content.hexdigest() for content in hashes],
        sample=np.concatenate(samples) if samples else np.empty((0, width), np.float32),
        sample_target=np.concatenate(targets) if targets else np.empty(0),
        digests=tuple(digests),
    )


class _Moments:
    """Mean and variance of columns, merged chunk by chunk in float64 (Chan, Golub, LeVeque 1979)."""

    def __init__(self, width: int) -> None:
        self.counts = np.zeros(width, dtype=np.int64)
        self.means, self._squares = np.zeros(width), np.zeros(width)

    def add(self, matrix: Matrix) -> None:
        numbers = matrix.astype(np.float64)
        present = ~np.isnan(numbers)
        counts = present.sum(axis=0)
        divisors = np.maximum(counts, 1)
        means = np.where(present, numbers, 0.0).sum(axis=0) / divisors
        squares = (np.where(present, numbers - means, 0.0) ** 2).sum(axis=0)
        total = self.counts + counts
        shift = means - self.means
        share = counts / np.maximum(total, 1)
        self._squares += squares + shift**2 * self.counts * share
        self.means = self.means + shift * share
        self.counts = total

    def spreads(self) -> Floats:
        """Return the standard deviations."""
        return np.asarray(np.sqrt(self._squares / np.maximum(self.counts, 1)))
