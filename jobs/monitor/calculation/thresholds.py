"""Compare the share of a chunk, or of an hour, with shares of a reference."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.monitor.calculation.measures import Measure


class ReferenceShares(NamedTuple):
    """Share of some values of one input in the reference."""

    by_chunk: npt.NDArray[np.float64]
    """Share in each chunk of the reference."""
    rows: int
    hits: int
    """Number of rows with such a value."""


def compare_share(share: float, size: int, reference: ReferenceShares) -> Measure:
    """Compare the share of a chunk of `size` rows with the shares of the reference's chunks."""
    # Laplace smoothing: a share of 0 or 1 in the reference has a sampling error, too.
    expected = (reference.hits + 1) / (reference.rows + 2)
    error = float(np.sqrt(expected * (1 - expected) / size))
    mean, deviation = float(reference.by_chunk.mean()), float(reference.by_chunk.std())
    upper = max(mean + 3 * deviation, expected + 3 * error)
    lower = min(mean - 3 * deviation, expected - 3 * error)
    return Measure(
        value=share,
        lower=None,
        upper=None,
        lower_threshold=lower if lower > 0 else None,
        upper_threshold=upper if upper < 1 else None,
        alert=share > upper or share < lower,
    )
