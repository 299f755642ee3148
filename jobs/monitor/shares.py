"""Shares of nulls and of values that the model does not know, by input and chunk.

A distance between distributions sees neither: nulls of a number are left out of it, and an input that becomes null
altogether, the commonest fault of all, has no distance. A share has left its threshold where three standard deviations
of the reference's chunks, and three sampling errors of a chunk of this size, do not explain it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from jobs.monitor.frames import MISSING, TIME, Frames
from jobs.monitor.measures import Measure, Measures


def missing_shares(frames: Frames) -> dict[str, Measures]:
    """Share of nulls of each input; by column, then chunk."""
    names = [*frames.continuous, *frames.categorical]
    return {
        name: _shares(frames, _nulls(frames, frames.reference, name), _nulls(frames, frames.served, name))
        for name in names
    }


def unseen_shares(frames: Frames) -> dict[str, Measures]:
    """Share of values that the model does not know, of each categorical input; a null is none of them."""
    return {
        name: _shares(frames, _unseen(frames.reference, name, known), _unseen(frames.served, name, known))
        for name, known in frames.known.items()
    }


def _nulls(frames: Frames, rows: pd.DataFrame, name: str) -> pd.Series:
    return rows[name].isna() if name in frames.continuous else rows[name] == MISSING


def _unseen(rows: pd.DataFrame, name: str, known: frozenset[str]) -> pd.Series:
    return ~rows[name].isin(known | {MISSING})


def _shares(frames: Frames, reference: pd.Series, served: pd.Series) -> Measures:
    before = reference.groupby(frames.reference[TIME]).mean().to_numpy(dtype=float)
    after = served.groupby(frames.served[TIME]).agg(["mean", "size"])
    return {
        chunk: _measure(float(row["mean"]), int(row["size"]), before, reference)
        for chunk, (_, row) in zip(frames.chunks, after.iterrows(), strict=True)
    }


def _measure(
    share: float, size: int, before: np.ndarray[tuple[int], np.dtype[np.float64]], reference: pd.Series
) -> Measure:
    # One more of either kind than there was (Laplace), so that a share of 0 in the reference has a sampling error, too.
    likely = (int(reference.sum()) + 1) / (len(reference) + 2)
    error = float(np.sqrt(likely * (1 - likely) / size))
    deviation = 3 * float(before.std())
    upper = max(float(before.mean()) + deviation, likely + 3 * error)
    lower = min(float(before.mean()) - deviation, likely - 3 * error)
    return Measure(
        value=share,
        lower=None,
        upper=None,
        lower_threshold=lower if lower > 0 else None,
        upper_threshold=upper if upper < 1 else None,
        alert=share > upper or share < lower,
    )
