"""Drift of all inputs together: how well the reference's principal components reconstruct the rows of a chunk.

A change of how inputs depend on each other leaves each input's own distribution as it was, so `drift` does not see it.
NannyML compresses the rows by PCA and restores them. The mean distance between a row and its restored form is the
reconstruction error. A null is replaced by the reference's mean, or by its most frequent value.
"""

from __future__ import annotations

from jobs.monitor.calculation.frames import TIME, Frames
from jobs.monitor.calculation.measures import Figure, undefined_figure
from jobs.monitor.calculation.nannyml_api import (
    CHUNK_PERIOD,
    REFERENCE_FAILED,
    StepResult,
    import_nannyml,
    measure_chunks,
    rows_of,
    try_step,
)

ERROR = "reconstruction_error"
"""NannyML's name for the figure."""
MIN_INPUTS = 2


def fit_reconstruction(frames: Frames) -> StepResult:
    """Fit NannyML's calculator to the reference."""
    names = [
        name for name in (*frames.continuous, *frames.categorical) if frames.reference[name].notna().any()
    ]
    if len(names) < MIN_INPUTS:
        return StepResult(None, f"fewer than {MIN_INPUTS} inputs can be measured")
    calculator = import_nannyml().DataReconstructionDriftCalculator(
        column_names=names, timestamp_column_name=TIME, chunk_period=CHUNK_PERIOD
    )
    reference = frames.reference[[*names, TIME]]
    return try_step(lambda: calculator.fit(reference), REFERENCE_FAILED)


def measure_reconstruction(frames: Frames, fitted: StepResult | None = None) -> Figure:
    """Measure the reconstruction error of each served chunk.

    Args:
        frames: Frames with the served chunks.
        fitted: Result of `fit_reconstruction`. None fits the calculator to the frames' reference.
    """
    fitted = fitted or fit_reconstruction(frames)
    if fitted.fault:
        return undefined_figure(frames.chunks, fitted.fault)
    return measure_chunks(frames, ERROR, lambda day: fitted.result.calculate(rows_of(frames.served, day)))
