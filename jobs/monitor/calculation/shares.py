"""Shares of nulls and of unknown values, by input and chunk.

A drift distance does not show nulls and unknown values. It ignores the nulls of a numeric input. It is undefined for an
input that is null in all rows, which is the most common fault.

A share gives an alert if its difference from the reference is larger than both of these: three standard deviations of
the shares in the reference's chunks, and three sampling errors of a chunk with this number of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from jobs.monitor.calculation.frames import MISSING, TIME, Frames
from jobs.monitor.calculation.measures import Measures
from jobs.monitor.calculation.thresholds import ReferenceShares, compare_share


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
