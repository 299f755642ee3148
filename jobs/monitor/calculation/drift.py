"""Drift of the inputs and of the score: the Jensen-Shannon distance between the reference and each served chunk.

Tests with p-values are not used, because in large chunks they find every small difference significant. The threshold is
NannyML's: three standard deviations from the mean of the reference's chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from cluster.runtime import Task
from jobs.monitor.calculation.frames import SCORE, TIME, Frames
from jobs.monitor.calculation.measures import Figure, Measure, Measures, undefined_figure, without_threshold
from jobs.monitor.calculation.nannyml_api import (
    CHUNK_FAILED,
    CHUNK_PERIOD,
    NO_VALUE,
    REFERENCE_FAILED,
    StepResult,
    chunk_days,
    finite_or_none,
    import_nannyml,
    num_defined,
    threshold_fault,
    try_step,
)

DISTANCE = "jensen_shannon"
"""NannyML's name for the distance."""


class FittedColumn(NamedTuple):
    """NannyML's distance of one column, fitted to the reference."""

    method: Any
    num_defined: int
    """Number of the reference's chunks with a value."""


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
    return try_step(lambda: _fitted_column(calculator.fit(reference), name), REFERENCE_FAILED)


def _fitted_column(calculator: Any, name: str) -> FittedColumn:
    """Return what a chunk needs. The calculator has copies of the reference, and copies each chunk too."""
    [method] = calculator._column_to_models_mapping[name]
    return FittedColumn(method, num_defined(calculator.result, (name, DISTANCE)))


def _drift_of_column(frames: Frames, name: str, fitted: StepResult) -> Figure:
    if fitted.fault:
        return undefined_figure(frames.chunks, fitted.fault)
    measures: Measures = {}
    reasons: dict[str, str] = {}
    for chunk, day in chunk_days(frames):
        values = frames.served.loc[frames.served[TIME] == day, name].dropna()
        if values.empty:
            reasons[chunk] = "undefined: no values in this chunk"
            continue
        calculated = try_step(functools.partial(fitted.result.method.calculate, values), CHUNK_FAILED)
        if calculated.fault:
            reasons[chunk] = f"undefined: {calculated.fault}"
            continue
        measure = _measure(fitted.result.method, calculated.result)
        if measure is None:
            reasons[chunk] = NO_VALUE
            continue
        if reason := threshold_fault(fitted.result.num_defined):
            reasons[chunk], measure = reason, without_threshold(measure.value)
        measures[chunk] = measure
    return Figure(measures=measures, reasons=reasons)


def _measure(method: Any, value: Any) -> Measure | None:
    if (distance := finite_or_none(value)) is None:
        return None
    return Measure(
        value=distance,
        lower=None,
        upper=None,
        lower_threshold=finite_or_none(method.lower_threshold_value),
        upper_threshold=finite_or_none(method.upper_threshold_value),
        alert=bool(method.alert(value)),
    )
