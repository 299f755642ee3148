"""Combine the figures of several chunks. A run that computes nothing needs this, so pandas is not imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import polars as pl

from jobs.monitor.calculation.measures import Measure

Figures = dict[str, Any]
"""JSON content of a version's result file."""
RECONSTRUCTION = "drift of all inputs together"
"""Name of the reconstruction error among the undefined figures."""
_BY_COLUMN = ("drift", "missing", "unseen")
_BY_CHUNK = ("periods", "reconstruction")


class ChunkResult(NamedTuple):
    """What monitoring keeps of one chunk."""

    figures: Figures
    odd_outcomes: int
    """Rows whose last outcome is invalid for the model."""
    unknown_rows: int
    """Outcomes whose prediction has answers, but not the row."""
    odd_inputs: dict[str, int]
    """For each input, the number of logged values that do not have the input's type."""


def small_chunk(chunk: str, rows: pl.DataFrame, *, metric: str, min_rows: int) -> Figures:
    """Return the figures of a chunk with fewer than `min_rows` rows: none, and the reason with its number of rows.

    Args:
        chunk: Name of the chunk.
        rows: Its rows.
        metric: Name of the performance metric.
        min_rows: Smallest number of rows of a chunk with figures.
    """
    reason = {chunk: f"chunk below min_rows: {rows.height} of {min_rows}"}
    names = (f"estimated_{metric}", f"realised_{metric}", "drift")
    return no_figures() | {
        "periods": {chunk: period(metric, rows, None, None)},
        "undefined": {name: dict(reason) for name in names},
    }


def no_figures() -> Figures:
    """Return the figures of no chunk."""
    return {name: {} for name in (*_BY_CHUNK, *_BY_COLUMN, "undefined")}


def combine(figures: Iterable[Mapping[str, Any]]) -> Figures:
    """Combine the figures of several chunks. They are given in the order of their chunks."""
    combined = no_figures()
    for one in figures:
        for name in _BY_CHUNK:
            combined[name] |= one[name]
        for name in (*_BY_COLUMN, "undefined"):
            for column, by_chunk in one[name].items():
                combined[name].setdefault(column, {}).update(by_chunk)
    return combined


def period(
    metric: str, rows: pl.DataFrame, estimate: Measure | None, realisation: Measure | None
) -> dict[str, Any]:
    """Return a chunk's performance, and its numbers of rows and outcomes."""
    return {
        f"estimated_{metric}": None if estimate is None else estimate.value,
        f"realised_{metric}": None if realisation is None else realisation.value,
        "rows": rows.height,
        "outcomes": num_outcomes(rows),
        "estimate": None if estimate is None else asdict(estimate),
        "realisation": None if realisation is None else asdict(realisation),
    }


def num_outcomes(rows: pl.DataFrame) -> int:
    """Return the number of rows with a valid outcome."""
    return int(rows["outcome"].is_not_null().sum())
