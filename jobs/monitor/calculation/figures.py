"""Compute all figures of the chunks of one version."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import polars as pl

from jobs.monitor.calculation.combining import RECONSTRUCTION, Figures, period
from jobs.monitor.calculation.drift import measure_drift
from jobs.monitor.calculation.fit import Fit, fit_reference
from jobs.monitor.calculation.frames import Frames
from jobs.monitor.calculation.measures import METRIC_NAMES, Measures
from jobs.monitor.calculation.performance import estimate_performance, realised_performance
from jobs.monitor.calculation.reconstruction import measure_reconstruction
from jobs.monitor.calculation.shares import missing_shares, unseen_shares
from jobs.monitor.chunks import CHUNK


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


def _to_json_values(measures: Measures) -> dict[str, Any]:
    return {chunk: asdict(measure) for chunk, measure in measures.items()}
