"""Compute all figures of the chunks of one version, and combine the figures of several chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import polars as pl

from jobs.monitor.calculation.drift import measure_drift
from jobs.monitor.calculation.fit import Fit, fit_reference
from jobs.monitor.calculation.frames import Frames
from jobs.monitor.calculation.measures import Measure, Measures
from jobs.monitor.calculation.performance import METRIC_NAMES, estimate_performance, realised_performance
from jobs.monitor.calculation.reconstruction import measure_reconstruction
from jobs.monitor.calculation.shares import missing_shares, unseen_shares
from jobs.monitor.chunks import CHUNK

Figures = dict[str, Any]
"""JSON content of a version's result file."""
RECONSTRUCTION = "drift of all inputs together"
"""Name of the reconstruction error among the undefined figures."""
_BY_COLUMN = ("drift", "missing", "unseen")
_BY_CHUNK = ("periods", "reconstruction")


def compute_figures(
    frames: Frames, served: pl.DataFrame, fit: Fit | None = None, *, min_outcomes: int
) -> Figures:
    """Compute every figure of one version for each chunk of `served`.

    Args:
        frames: Frames with the served chunks.
        served: The served rows, with the columns `_chunk` and `outcome`.
        fit: What was fitted to the reference. None fits it to the frames' reference.
        min_outcomes: A chunk with fewer outcomes has no realised performance.
    """
    fit = fit or fit_reference(frames)
    estimates = estimate_performance(frames, fit.estimator)
    realised = realised_performance(frames, fit.calculator, min_outcomes=min_outcomes)
    drift = measure_drift(frames, fit.drift)
    reconstruction = measure_reconstruction(frames, fit.reconstruction)
    missing, unseen = missing_shares(frames, fit.shares), unseen_shares(frames, fit.shares)
    metric = METRIC_NAMES[frames.task]
    periods = {
        chunk: period(
            metric,
            served.filter(pl.col(CHUNK) == chunk),
            estimates.measures.get(chunk),
            realised.measures.get(chunk),
        )
        for chunk in frames.chunks
    }
    undefined = {f"estimated_{metric}": estimates.reasons, f"realised_{metric}": realised.reasons}
    undefined |= {f"drift of {name}": figure.reasons for name, figure in drift.items()}
    undefined |= {RECONSTRUCTION: reconstruction.reasons}
    return {
        "periods": periods,
        "drift": {name: _to_json_values(figure.measures) for name, figure in drift.items()},
        "reconstruction": _to_json_values(reconstruction.measures),
        "missing": {name: _to_json_values(measures) for name, measures in missing.items()},
        "unseen": {name: _to_json_values(measures) for name, measures in unseen.items()},
        "undefined": {name: by_chunk for name, by_chunk in undefined.items() if by_chunk},
    }


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


def _to_json_values(measures: Measures) -> dict[str, Any]:
    return {chunk: asdict(measure) for chunk, measure in measures.items()}
