"""Shares of nulls and of unknown values, by input and chunk.

A drift distance does not show nulls and unknown values. It ignores the nulls of a numeric input. It is undefined for an
input that is null in all rows, which is the most common fault.

A share gives an alert if its difference from the reference is larger than both of these: three standard deviations of
the shares in the reference's chunks, and three sampling errors of a chunk with this number of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from jobs.monitor.calculation.frames import MISSING, TIME, Frames
from jobs.monitor.calculation.measures import Measure, Measures


class ReferenceShares(NamedTuple):
    """Share of some values of one input in the reference."""

    by_chunk: npt.NDArray[np.float64]
    """Share in each chunk of the reference."""
    rows: int
    hits: int
    """Number of rows with such a value."""


class FittedShares(NamedTuple):
    """Shares of the reference, by input."""

    missing: dict[str, ReferenceShares]
    """Shares of nulls."""
    unseen: dict[str, ReferenceShares]
    """Shares of values that the model does not know. Only categorical inputs have one."""


def fit_shares(frames: Frames) -> FittedShares:
    """Compute the shares of the reference."""
    reference = frames.reference
    names = [*frames.continuous, *frames.categorical]
    return FittedShares(
        missing={name: _of_reference(reference, _nulls(frames, reference, name)) for name in names},
        unseen={
            name: _of_reference(reference, _unseen(reference, name, known))
            for name, known in frames.known.items()
        },
    )


def missing_shares(frames: Frames, fit: FittedShares | None = None) -> dict[str, Measures]:
    """Return the share of nulls by input and chunk.

    Args:
        frames: Frames with the served chunks.
        fit: Shares of the reference. None computes them from the frames' reference.
    """
    fitted = (fit or fit_shares(frames)).missing
    names = [*frames.continuous, *frames.categorical]
    return {name: _shares(frames, fitted[name], _nulls(frames, frames.served, name)) for name in names}


def unseen_shares(frames: Frames, fit: FittedShares | None = None) -> dict[str, Measures]:
    """Return the share of values that the model does not know, by categorical input and chunk, without nulls.

    Args:
        frames: Frames with the served chunks.
        fit: Shares of the reference. None computes them from the frames' reference.
    """
    fitted = (fit or fit_shares(frames)).unseen
    return {
        name: _shares(frames, fitted[name], _unseen(frames.served, name, known))
        for name, known in frames.known.items()
    }


def _nulls(frames: Frames, rows: pd.DataFrame, name: str) -> pd.Series:
    return rows[name].isna() if name in frames.continuous else rows[name] == MISSING


def _unseen(rows: pd.DataFrame, name: str, known: frozenset[str]) -> pd.Series:
    return ~rows[name].isin(known | {MISSING})


def _of_reference(reference: pd.DataFrame, hits: pd.Series) -> ReferenceShares:
    by_chunk = hits.groupby(reference[TIME]).mean().to_numpy(dtype=float)
    return ReferenceShares(by_chunk, rows=len(hits), hits=int(hits.sum()))


def _shares(frames: Frames, reference: ReferenceShares, served: pd.Series) -> Measures:
    chunks = served.groupby(frames.served[TIME]).agg(["mean", "size"])
    return {
        chunk: compare_share(float(row["mean"]), int(row["size"]), reference)
        for chunk, (_, row) in zip(frames.chunks, chunks.iterrows(), strict=True)
    }


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
