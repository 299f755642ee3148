"""Drift of the inputs and of the score: the Jensen-Shannon distance between the reference and each served chunk.

Tests with p-values are not used, because in large chunks they find every small difference significant. The threshold is
NannyML's: three standard deviations from the mean of the reference's chunks.
"""

from __future__ import annotations

from cluster.runtime import Task
from jobs.monitor.frames import SCORE, TIME, Frames
from jobs.monitor.measures import Figure, undefined_figure
from jobs.monitor.nannyml_api import (
    CHUNK_FAILED,
    CHUNK_PERIOD,
    REFERENCE_FAILED,
    chunk_days,
    figure_from_result,
    import_nannyml,
    try_step,
)

DISTANCE = "jensen_shannon"
"""NannyML's name for the distance."""


def measure_drift(frames: Frames) -> dict[str, Figure]:
    """For each input, and for a binary model's score, measure the distance from the reference. The keys are columns."""
    figures = {name: undefined_figure(frames.chunks, reason) for name, reason in frames.unusable.items()}
    score = [SCORE] if frames.task is Task.binary else []
    for name in [*frames.continuous, *frames.categorical, *score]:
        figures[name] = _drift_of_column(frames, name)
    return figures


def _drift_of_column(frames: Frames, name: str) -> Figure:
    if name not in frames.reference or not frames.reference[name].notna().any():
        return undefined_figure(frames.chunks, "no values in the reference")
    has_values = frames.served[name].notna().groupby(frames.served[TIME]).any()
    empty = {
        chunk: "undefined: no values in this chunk"
        for chunk, day in chunk_days(frames)
        if not has_values.get(day, False)
    }
    if len(empty) == len(frames.chunks):
        return Figure(reasons=empty)
    calculator = import_nannyml().UnivariateDriftCalculator(
        column_names=[name],
        treat_as_categorical=[name] if name in frames.categorical else [],
        timestamp_column_name=TIME,
        chunk_period=CHUNK_PERIOD,
        continuous_methods=[DISTANCE],
        categorical_methods=[DISTANCE],
    )
    columns = [name, TIME]  # only these two, so that a null in another column drops no row
    reference = frames.reference[columns].dropna(subset=[name])
    served = frames.served[columns].dropna(subset=[name])
    fitted = try_step(lambda: calculator.fit(reference), REFERENCE_FAILED)
    if fitted.fault:
        return undefined_figure(frames.chunks, fitted.fault)
    calculated = try_step(lambda: calculator.calculate(served), CHUNK_FAILED)
    if calculated.fault:
        return undefined_figure(frames.chunks, calculated.fault)
    return figure_from_result(calculated.result, (name, DISTANCE), frames.chunks, reasons=empty)
