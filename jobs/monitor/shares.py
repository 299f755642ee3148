"""Shares of nulls and of unknown values, by input and chunk.

A drift distance does not show nulls and unknown values. It ignores the nulls of a numeric input. It is undefined for an
input that is null in all rows, which is the most common fault.

A share gives an alert if its difference from the reference is larger than both of these: three standard deviations of
the shares in the reference's chunks, and three sampling errors of a chunk with this number of rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from jobs.monitor.frames import MISSING, TIME, Frames
from jobs.monitor.measures import Measure, Measures


def missing_shares(frames: Frames) -> dict[str, Measures]:
    """Return the share of nulls by input and chunk."""
    names = [*frames.continuous, *frames.categorical]
    return {
        name: _shares(frames, _nulls(frames, frames.reference, name), _nulls(frames, frames.served, name))
        for name in names
    }


def unseen_shares(frames: Frames) -> dict[str, Measures]:
    """Return the share of values that the model does not know, by categorical input and chunk, without nulls."""
    return {
        name: _shares(frames, _unseen(frames.reference, name, known), _unseen(frames.served, name, known))
        for name, known in frames.known.items()
    }


def _nulls(frames: Frames, rows: pd.DataFrame, name: str) -> pd.Series:
    return rows[name].isna() if name in frames.continuous else rows[name] == MISSING


def _unseen(rows: pd.DataFrame, name: str, known: frozenset[str]) -> pd.Series:
    return ~rows[name].isin(known | {MISSING})


def _shares(frames: Frames, reference: pd.Series, served: pd.Series) -> Measures:
    reference_shares = reference.groupby(frames.reference[TIME]).mean().to_numpy(dtype=float)
    chunks = served.groupby(frames.served[TIME]).agg(["mean", "size"])
    return {
        chunk: _measure(float(row["mean"]), int(row["size"]), reference_shares, reference)
        for chunk, (_, row) in zip(frames.chunks, chunks.iterrows(), strict=True)
    }


def _measure(
    share: float, size: int, reference_shares: npt.NDArray[np.float64], reference: pd.Series
) -> Measure:
    """Compare the share of a chunk of `size` rows with the shares of the reference's chunks."""
    # Laplace smoothing: a share of 0 or 1 in the reference has a sampling error, too.
    expected = (int(reference.sum()) + 1) / (len(reference) + 2)
    error = float(np.sqrt(expected * (1 - expected) / size))
    mean, deviation = float(reference_shares.mean()), float(reference_shares.std())
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
