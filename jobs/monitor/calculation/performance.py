"""Estimated and realised performance of the served rows.

Estimated performance needs no outcomes. For a classifier, NannyML's CBPE (confidence-based performance estimation)
computes it from calibrated probabilities. For a regression, NannyML's DLE (direct loss estimation) computes it. Neither
method can detect concept drift. Realised performance needs outcomes, and can show concept drift. So both are reported.

Thresholds and intervals are NannyML's. A threshold is three standard deviations from the mean of the reference's
chunks. An interval is the value plus and minus three sampling errors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cluster.runtime import Task
from jobs.monitor.calculation.frames import PREDICTED, PROBABILITY, SCORE, TIME, TRUTH, Frames
from jobs.monitor.calculation.measures import Figure, undefined_figure, without_threshold
from jobs.monitor.calculation.nannyml_api import (
    CHUNK_PERIOD,
    REFERENCE_FAILED,
    StepResult,
    chunk_days,
    import_nannyml,
    measure_chunks,
    rows_of,
    try_step,
)

NANNYML_METRICS = {Task.binary: "roc_auc", Task.multiclass: "roc_auc", Task.regression: "rmse"}
"""NannyML's name for the metric of each task."""
MIN_OF_CLASS = 2
"""Each class needs this many reference rows, because NannyML splits the reference for calibration."""

_NO_SCORED_ROW = "the reference has no scored row with a label"


class FittedCalculator(NamedTuple):
    """What realised performance needs of the reference."""

    fitted: StepResult
    """NannyML's calculator, fitted to the reference. Its fault says why there is none."""
    fault: str
    """Why the reference gives no valid threshold, or an empty text."""
    dtype: Any
    """Type of the reference's labels."""


def fit_estimator(frames: Frames) -> StepResult:
    """Fit the estimator of performance. This needs a reference with all classes."""
    reference = scored_reference(frames)
    if fault := _estimate_fault(frames, reference):
        return StepResult(None, fault)
    nannyml, metric = import_nannyml(), NANNYML_METRICS[frames.task]
    match frames.task:
        case Task.binary | Task.multiclass:
            estimator = nannyml.CBPE(**_problem(frames), metrics=[metric], chunk_period=CHUNK_PERIOD)
        case Task.regression:
            estimator = nannyml.DLE(
                feature_column_names=frames.continuous + frames.categorical,
                y_pred=PREDICTED,
                y_true=TRUTH,
                timestamp_column_name=TIME,
                metrics=[metric],
                chunk_period=CHUNK_PERIOD,
            )
    return try_step(lambda: estimator.fit(reference), "the estimator cannot be fitted to the reference")


def fit_calculator(frames: Frames) -> FittedCalculator:
    """Fit the calculator of realised performance, for its thresholds."""
    reference = scored_reference(frames)
    fault = frames.reference_fault or _class_fault(frames, reference, least=1)
    if frames.reference_fault or reference.empty:
        return FittedCalculator(StepResult(None, fault or _NO_SCORED_ROW), fault, None)
    metric = NANNYML_METRICS[frames.task]
    calculator = import_nannyml().PerformanceCalculator(
        **_problem(frames), metrics=[metric], chunk_period=CHUNK_PERIOD
    )
    fitted = try_step(lambda: calculator.fit(reference), REFERENCE_FAILED)
    return FittedCalculator(fitted, fault, reference[TRUTH].dtype)


def estimate_performance(frames: Frames, fitted: StepResult | None = None) -> Figure:
    """Estimate performance in each served chunk, without outcomes.

    Args:
        frames: Frames with the served chunks.
        fitted: Result of `fit_estimator`. None fits the estimator to the frames' reference.
    """
    fitted = fitted or fit_estimator(frames)
    if fitted.fault:
        return undefined_figure(frames.chunks, fitted.fault)
    estimator, metric = fitted.result, NANNYML_METRICS[frames.task]
    served = frames.served.drop(columns=TRUTH)
    return measure_chunks(frames, metric, lambda day: estimator.estimate(rows_of(served, day)))


def realised_performance(frames: Frames, fit: FittedCalculator | None = None, *, min_outcomes: int) -> Figure:
    """Measure performance in each served chunk with enough outcomes. Only rows with an outcome are used.

    Args:
        frames: Frames with the served chunks.
        fit: Result of `fit_calculator`. None fits the calculator to the frames' reference.
        min_outcomes: A chunk with fewer outcomes has no realised performance.
    """
    known = frames.served.dropna(subset=[TRUTH])
    reasons = {
        chunk: reason
        for chunk, day in chunk_days(frames)
        if (reason := _outcome_fault(frames, known[known[TIME] == day], min_outcomes))
    }
    if len(reasons) == len(frames.chunks):
        return Figure(reasons=reasons)
    calculator, fault, dtype = fit or fit_calculator(frames)
    if calculator.fault:
        return _without_reference(frames, known, reasons, calculator.fault)
    rows = known.astype({TRUTH: dtype})
    figure = measure_chunks(
        frames,
        NANNYML_METRICS[frames.task],
        lambda day: calculator.result.calculate(rows_of(rows, day)),
        skipped=reasons,
    )
    if not fault:
        return figure
    # A reference that lacks a class gives no valid threshold.
    measures = {chunk: without_threshold(measure.value) for chunk, measure in figure.measures.items()}
    return Figure(
        measures=measures, reasons=figure.reasons | dict.fromkeys(measures, f"no threshold: {fault}")
    )


def scored_reference(frames: Frames) -> pd.DataFrame:
    """Return the reference rows with a label and a finite score. Served performance is compared with these rows."""
    if frames.reference_fault:
        return frames.reference.head(0)
    scores = [SCORE] if frames.task is Task.binary else [PREDICTED]
    if frames.task is Task.multiclass:
        scores = _probability_columns(frames.reference)
    finite = np.isfinite(frames.reference[scores].to_numpy(dtype=float)).all(axis=1)
    rows = frames.reference[finite & frames.reference[TRUTH].notna().to_numpy()]
    return rows if frames.task is Task.multiclass else rows.astype({TRUTH: float})


def _estimate_fault(frames: Frames, reference: pd.DataFrame) -> str:
    """Return why performance cannot be estimated, or an empty text if an estimate can be tried."""
    if frames.reference_fault:
        return frames.reference_fault
    if reference.empty:
        return _NO_SCORED_ROW
    if frames.task is Task.regression and not frames.continuous + frames.categorical:
        return "no input can be measured"
    return _class_fault(frames, reference, least=MIN_OF_CLASS)


def _class_fault(frames: Frames, reference: pd.DataFrame, *, least: int) -> str:
    """Return a text that names a class with fewer than `least` reference rows, or an empty text if there is none."""
    if frames.task is Task.regression or reference.empty:
        return ""
    counts = reference[TRUTH].value_counts()
    if frames.task is Task.binary:
        rows = {
            f"{name} class": int(counts.get(code, 0)) for name, code in (("negative", 0), ("positive", 1))
        }
    else:
        names = [name.removeprefix(PROBABILITY) for name in _probability_columns(frames.reference)]
        rows = {f"class '{name}'": int(counts.get(name, 0)) for name in names}
    too_few = [
        f"{count or 'no'} row{'s' * (count != 1)} of {name}" for name, count in rows.items() if count < least
    ]
    return f"the reference has {too_few[0]}" if too_few else ""


def _outcome_fault(frames: Frames, known: pd.DataFrame, min_outcomes: int) -> str:
    """Return why a chunk has no realised performance, or an empty text. `known` has the rows with an outcome."""
    if len(known) < min_outcomes:
        return f"too few outcomes: {len(known)} of {min_outcomes}"
    if frames.task is Task.regression:
        return ""
    num_classes = known[TRUTH].nunique()
    if num_classes == 1:
        return "undefined: one class in this chunk"
    expected = 2 if frames.task is Task.binary else len(_probability_columns(frames.served))
    return "" if num_classes == expected else f"undefined: {num_classes} of {expected} classes in this chunk"


def _without_reference(frames: Frames, known: pd.DataFrame, reasons: dict[str, str], fault: str) -> Figure:
    """Measure performance without thresholds.

    Args:
        frames: The frames.
        known: Served rows with an outcome.
        reasons: Chunks that have no performance, with the reason.
        fault: Reason why there is no threshold.
    """
    measures = {
        chunk: without_threshold(_score(frames, known[known[TIME] == day]))
        for chunk, day in chunk_days(frames)
        if chunk not in reasons
    }
    return Figure(measures=measures, reasons=reasons | dict.fromkeys(measures, f"no threshold: {fault}"))


def _score(frames: Frames, rows: pd.DataFrame) -> float:
    """Compute the metric without NannyML, because NannyML needs a reference."""
    from sklearn.metrics import mean_squared_error, roc_auc_score

    match frames.task:
        case Task.binary:
            return float(roc_auc_score(rows[TRUTH].astype(float), rows[SCORE]))
        case Task.multiclass:
            columns = sorted(_probability_columns(rows))
            names = [name.removeprefix(PROBABILITY) for name in columns]
            return float(roc_auc_score(rows[TRUTH], rows[columns], multi_class="ovr", labels=names))
        case Task.regression:
            return float(mean_squared_error(rows[TRUTH], rows[PREDICTED]) ** 0.5)


def _probability_columns(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame.columns if str(name).startswith(PROBABILITY)]


def _problem(frames: Frames) -> dict[str, Any]:
    """Return the arguments that tell NannyML the task and the columns."""
    common = {"y_true": TRUTH, "y_pred": PREDICTED, "timestamp_column_name": TIME}
    match frames.task:
        case Task.binary:
            return common | {"problem_type": "classification_binary", "y_pred_proba": SCORE}
        case Task.multiclass:
            scores = {name.removeprefix(PROBABILITY): name for name in _probability_columns(frames.reference)}
            return common | {"problem_type": "classification_multiclass", "y_pred_proba": scores}
        case Task.regression:
            return common | {"problem_type": "regression"}
