"""Drift of the inputs and of the score: the Jensen-Shannon distance between the reference and each served chunk.

Tests with p-values are not used, because in large chunks they find every small difference significant. The threshold is
NannyML's: three standard deviations from the mean of the reference's chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.runtime import Task
from jobs.monitor.calculation.frames import SCORE, TIME, Frames
from jobs.monitor.calculation.measures import Figure, undefined_figure
from jobs.monitor.calculation.nannyml_api import (
    CHUNK_FAILED,
    CHUNK_PERIOD,
    REFERENCE_FAILED,
    StepResult,
    chunk_days,
    figure_from_result,
    import_nannyml,
    try_step,
)

DISTANCE = "jensen_shannon"
"""NannyML's name for the distance."""


def fit_drift(frames: Frames) -> dict[str, StepResult]:
    """For each input, and for a binary model's score, fit NannyML's calculator to the reference. Keys are columns."""
    score = [SCORE] if frames.task is Task.binary else []
    return {name: _fit_column(frames, name) for name in [*frames.continuous, *frames.categorical, *score]}


def measure_drift(frames: Frames, fits: Mapping[str, StepResult] | None = None) -> dict[str, Figure]:
    """For each input, and for a binary model's score, measure the distance from the reference. The keys are columns.

    Args:
        frames: Frames with the served chunks.
        fits: Result of `fit_drift`. None fits the calculators to the frames' reference.
    """
    fits = fit_drift(frames) if fits is None else fits
    figures = {name: undefined_figure(frames.chunks, reason) for name, reason in frames.unusable.items()}
    for name, fitted in fits.items():
        if name not in frames.unusable:
            figures[name] = _drift_of_column(frames, name, fitted)
    return figures


def _fit_column(frames: Frames, name: str) -> StepResult:
    if name not in frames.reference or not frames.reference[name].notna().any():
        return StepResult(None, "no values in the reference")
    calculator = import_nannyml().UnivariateDriftCalculator(
        column_names=[name],
        treat_as_categorical=[name] if name in frames.categorical else [],
        timestamp_column_name=TIME,
        chunk_period=CHUNK_PERIOD,
        continuous_methods=[DISTANCE],
        categorical_methods=[DISTANCE],
    )
    # Only these two columns, so that a null in another column drops no row.
    reference = frames.reference[[name, TIME]].dropna(subset=[name])
    return try_step(lambda: _without_rows(calculator.fit(reference)), REFERENCE_FAILED)


def _without_rows(calculator: Any) -> Any:
    """Remove the copies of the reference that NannyML keeps for plots."""
    calculator.result.reference_data = None
    calculator.result.analysis_data = None
    return calculator


def _drift_of_column(frames: Frames, name: str, fitted: StepResult) -> Figure:
    if fitted.fault:
        return undefined_figure(frames.chunks, fitted.fault)
    has_values = frames.served[name].notna().groupby(frames.served[TIME]).any()
    empty = {
        chunk: "undefined: no values in this chunk"
        for chunk, day in chunk_days(frames)
        if not has_values.get(day, False)
    }
    if len(empty) == len(frames.chunks):
        return Figure(reasons=empty)
    served = frames.served[[name, TIME]].dropna(subset=[name])
    calculated = try_step(lambda: fitted.result.calculate(served), CHUNK_FAILED)
    if calculated.fault:
        return undefined_figure(frames.chunks, calculated.fault)
    return figure_from_result(calculated.result, (name, DISTANCE), frames.chunks, reasons=empty)
