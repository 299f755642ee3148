"""Estimated performance, realised performance and drift, computed by NannyML from the reference and the served rows.

CBPE estimates performance from calibrated probabilities, so it cannot see concept drift. Realised performance can, once
outcomes are known. Both are reported side by side; neither replaces the other. DLE estimates the error of a regression.
Drift is the Jensen-Shannon distance only, because tests with p-values call every difference significant if chunks are
large. Thresholds are three standard deviations around the mean of the reference's chunks. Intervals are three sampling
errors to each side. Both are NannyML's.

Each figure fails alone. An undefined figure has a reason instead of a value and raises no alert.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cluster.runtime import Task
from jobs.monitor.frames import EPOCH, PREDICTED, PROBABILITY, SCORE, TIME, TRUTH, Frames

LOG = logging.getLogger("falaj.monitor")
METRICS = {Task.binary: "roc_auc", Task.multiclass: "roc_auc", Task.regression: "rmse"}
"""NannyML's name of each task's metric."""
SHORT = {"roc_auc": "auc", "rmse": "rmse"}
"""Our name of a metric, by NannyML's name."""
MIN_OF_CLASS = 2
"""Smallest number of reference rows of each class; NannyML needs them to split the reference for calibration."""
MIN_DEFINED = 3
"""Smallest number of reference chunks with a value; with fewer there is no threshold."""
DISTANCE = "jensen_shannon"
"""NannyML's name of the drift distance."""

_PERIOD = "D"
_NO_SCORED_ROW = "the reference has no scored row with a label"
_REFERENCE_FAILED = "the reference cannot be measured"
_CHUNK_FAILED = "it cannot be measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Value of one figure in one chunk, with its interval and thresholds."""

    value: float
    lower: float | None
    upper: float | None
    """Ends of the interval that sampling alone explains; None for a distance."""
    lower_threshold: float | None
    upper_threshold: float | None
    alert: bool
    """True if the value is beyond a threshold."""


Measures = dict[str, Measure]
"""Measures by chunk, without the chunks whose figure is undefined."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure in all chunks."""

    measures: Measures = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Reason why a chunk has no value or no threshold, by chunk."""


def estimate_performance(frames: Frames) -> Figure:
    """Estimate performance in each served chunk. Needs a reference with all classes, but no outcomes."""
    reference = scored_reference(frames)
    if fault := _estimate_fault(frames, reference):
        return _undefined(frames, fault)
    nannyml, metric = _import_nannyml(), METRICS[frames.task]
    match frames.task:
        case Task.binary | Task.multiclass:
            estimator = nannyml.CBPE(**_problem(frames), metrics=[metric], chunk_period=_PERIOD)
        case Task.regression:
            estimator = nannyml.DLE(
                feature_column_names=frames.continuous + frames.categorical,
                y_pred=PREDICTED,
                y_true=TRUTH,
                timestamp_column_name=TIME,
                metrics=[metric],
                chunk_period=_PERIOD,
            )
    served = frames.served.drop(columns=TRUTH)
    fitted = _attempt(lambda: estimator.fit(reference), "the estimator cannot be fitted to the reference")
    if fitted.fault:
        return _undefined(frames, fitted.fault)
    return _measure_chunks(frames, metric, lambda day: estimator.estimate(served[served[TIME] == day]))


def realised_performance(frames: Frames, *, min_outcomes: int) -> Figure:
    """Measure performance in each served chunk that has enough outcomes, over the rows with an outcome."""
    known = frames.served.dropna(subset=[TRUTH])
    reasons = {
        chunk: reason
        for chunk, day in _chunk_days(frames)
        if (reason := _outcome_fault(frames, known[known[TIME] == day], min_outcomes))
    }
    if len(reasons) == len(frames.chunks):
        return Figure(reasons=reasons)
    reference = scored_reference(frames)
    fault = frames.reference_fault or _class_fault(frames, reference, least=1)
    if frames.reference_fault or reference.empty:
        return _without_reference(frames, known, reasons, fault or _NO_SCORED_ROW)
    metric = METRICS[frames.task]
    calculator = _import_nannyml().PerformanceCalculator(
        **_problem(frames), metrics=[metric], chunk_period=_PERIOD
    )
    fitted = _attempt(lambda: calculator.fit(reference), _REFERENCE_FAILED)
    if fitted.fault:
        return _without_reference(frames, known, reasons, fitted.fault)
    rows = known.astype({TRUTH: reference[TRUTH].dtype})
    figure = _measure_chunks(
        frames, metric, lambda day: calculator.calculate(rows[rows[TIME] == day]), skipped=reasons
    )
    if not fault:
        return figure
    # A reference without one class gives no valid threshold.
    measures = {chunk: _without_threshold(measure.value) for chunk, measure in figure.measures.items()}
    return Figure(
        measures=measures, reasons=figure.reasons | dict.fromkeys(measures, f"no threshold: {fault}")
    )


def measure_drift(frames: Frames) -> dict[str, Figure]:
    """Measure the distance of each input, and of a binary model's score, from the reference. The keys are columns."""
    figures = {name: _undefined(frames, reason) for name, reason in frames.unusable.items()}
    score = [SCORE] if frames.task is Task.binary else []
    for name in [*frames.continuous, *frames.categorical, *score]:
        figures[name] = _drift_of_column(frames, name)
    return figures


def scored_reference(frames: Frames) -> pd.DataFrame:
    """Return the reference rows with a label and a finite score; served performance is compared with these."""
    if frames.reference_fault:
        return frames.reference.head(0)
    scores = [SCORE] if frames.task is Task.binary else [PREDICTED]
    if frames.task is Task.multiclass:
        scores = _probability_columns(frames.reference)
    finite = np.isfinite(frames.reference[scores].to_numpy(dtype=float)).all(axis=1)
    rows = frames.reference[finite & frames.reference[TRUTH].notna().to_numpy()]
    return rows if frames.task is Task.multiclass else rows.astype({TRUTH: float})


def _drift_of_column(frames: Frames, name: str) -> Figure:
    if name not in frames.reference or not frames.reference[name].notna().any():
        return _undefined(frames, "no values in the reference")
    has_values = frames.served[name].notna().groupby(frames.served[TIME]).any()
    empty = {
        chunk: "undefined: no values in this chunk"
        for chunk, day in _chunk_days(frames)
        if not has_values.get(day, False)
    }
    if len(empty) == len(frames.chunks):
        return Figure(reasons=empty)
    calculator = _import_nannyml().UnivariateDriftCalculator(
        column_names=[name],
        treat_as_categorical=[name] if name in frames.categorical else [],
        timestamp_column_name=TIME,
        chunk_period=_PERIOD,
        continuous_methods=[DISTANCE],
        categorical_methods=[DISTANCE],
    )
    columns = [name, TIME]  # without the other columns, so that only nulls of this column drop rows
    reference = frames.reference[columns].dropna(subset=[name])
    served = frames.served[columns].dropna(subset=[name])
    fitted = _attempt(lambda: calculator.fit(reference), _REFERENCE_FAILED)
    if fitted.fault:
        return _undefined(frames, fitted.fault)
    calculated = _attempt(lambda: calculator.calculate(served), _CHUNK_FAILED)
    if calculated.fault:
        return _undefined(frames, calculated.fault)
    return _figure_from_result(calculated.result, (name, DISTANCE), frames.chunks, reasons=empty)


def _estimate_fault(frames: Frames, reference: pd.DataFrame) -> str:
    """Return why performance cannot be estimated; empty if it can be tried."""
    if frames.reference_fault:
        return frames.reference_fault
    if reference.empty:
        return _NO_SCORED_ROW
    if frames.task is Task.regression and not frames.continuous + frames.categorical:
        return "no input can be measured"
    return _class_fault(frames, reference, least=MIN_OF_CLASS)


def _class_fault(frames: Frames, reference: pd.DataFrame, *, least: int) -> str:
    """Return which class has fewer than `least` reference rows; empty if no class has."""
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
    """Return why a chunk's outcomes give no performance; empty if they do. `known` has the rows with an outcome."""
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
        chunk: _without_threshold(_score(frames, known[known[TIME] == day]))
        for chunk, day in _chunk_days(frames)
        if chunk not in reasons
    }
    return Figure(measures=measures, reasons=reasons | dict.fromkeys(measures, f"no threshold: {fault}"))


def _score(frames: Frames, rows: pd.DataFrame) -> float:
    """Compute the metric without NannyML, which cannot do so without a reference."""
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


def _measure_chunks(
    frames: Frames,
    name: str,
    measure_day: Callable[[Any], Any],
    *,
    skipped: dict[str, str] | None = None,
) -> Figure:
    """Measure a figure chunk by chunk, so that a chunk that fails does not affect the others.

    NannyML is fitted once. It gives the same values for single chunks as for all chunks together.

    Args:
        frames: The frames with the chunks.
        name: NannyML's name of the figure.
        measure_day: Returns NannyML's result for the rows of a day.
        skipped: Chunks to skip, with the reason.
    """
    measures: Measures = {}
    reasons = dict(skipped or {})
    undefined: dict[str, str] = {}
    for chunk, day in _chunk_days(frames):
        if chunk in reasons:
            continue
        attempt = _attempt(functools.partial(measure_day, day), _CHUNK_FAILED)
        if attempt.fault:
            reasons[chunk] = f"undefined: {attempt.fault}"
            continue
        figure = _figure_from_result(attempt.result, name, [chunk], reasons={})
        measures |= figure.measures
        undefined |= figure.reasons
    return Figure(measures=measures, reasons=reasons | undefined)


def _figure_from_result(
    result: Any, name: str | tuple[str, str], chunks: list[str], *, reasons: dict[str, str]
) -> Figure:
    """Convert NannyML's result, which has one row for each chunk that is not in `reasons`, to a figure."""
    # Sorted, because pandas warns about look-ups in NannyML's unsorted columns.
    table = result.filter(period="analysis").to_df().sort_index(axis="columns")[name]
    measured_chunks = [chunk for chunk in chunks if chunk not in reasons]
    reasons, measures = dict(reasons), {}
    num_defined = _num_defined(result, name)
    for chunk, (_, row) in zip(measured_chunks, table.iterrows(), strict=True):
        measure = _measure_from_row(row)
        if measure is None:
            reasons[chunk] = "undefined: NannyML gives no value"
            continue
        if num_defined < MIN_DEFINED:
            reasons[chunk] = f"no threshold: {num_defined} of the reference's chunks have a value"
            measure = replace(measure, lower_threshold=None, upper_threshold=None, alert=False)
        measures[chunk] = measure
    return Figure(measures=measures, reasons=reasons)


class _Attempt(NamedTuple):
    """Result of a step that may fail."""

    result: Any
    fault: str
    """Reason why the step failed; empty if it succeeded."""


def _attempt(step: Callable[[], Any], failure: str) -> _Attempt:
    """Run a step of NannyML and catch its error.

    The fault goes into the ledger. It does not contain NannyML's message, which may quote a value of the data; the
    message is only logged.

    Args:
        step: The step to run.
        failure: Text of the fault if the step fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reasons of the figures cover what the warnings say
            return _Attempt(step(), "")
    except Exception as error:
        LOG.warning("%s", failure, exc_info=error)
        return _Attempt(None, f"{failure} ({type(error).__name__}; see the job's output)")


def _undefined(frames: Frames, reason: str) -> Figure:
    return Figure(reasons=dict.fromkeys(frames.chunks, f"undefined: {reason}"))


def _without_threshold(value: float) -> Measure:
    return Measure(
        value=value, lower=None, upper=None, lower_threshold=None, upper_threshold=None, alert=False
    )


def _chunk_days(frames: Frames) -> Iterator[tuple[str, pd.Timestamp]]:
    """Yield each chunk with its artificial day in the column `_time`."""
    for position, chunk in enumerate(frames.chunks):
        yield chunk, pd.Timestamp(EPOCH) + pd.Timedelta(days=position)


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


def _num_defined(result: Any, name: str | tuple[str, str]) -> int:
    """Return the number of reference chunks with a value."""
    table = result.filter(period="reference").to_df().sort_index(axis="columns")[name]
    column = next(name for name in ("realized", "value") if name in table.columns)
    return int(np.isfinite(table[column].to_numpy(dtype=float)).sum())


def _measure_from_row(row: Any) -> Measure | None:
    """Convert a row of NannyML's result to a measure, or None if it has no value."""
    value = _finite_or_none(row.get("value"))
    if value is None:
        return None
    lower = _finite_or_none(row.get("lower_confidence_boundary"))
    upper = _finite_or_none(row.get("upper_confidence_boundary"))
    error = _finite_or_none(row.get("sampling_error"))
    if error is not None and lower is None and upper is None:
        lower, upper = value - 3 * error, value + 3 * error
    return Measure(
        value=value,
        lower=lower,
        upper=upper,
        lower_threshold=_finite_or_none(row.get("lower_threshold")),
        upper_threshold=_finite_or_none(row.get("upper_threshold")),
        alert=bool(row["alert"]),
    )


def _finite_or_none(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _import_nannyml() -> Any:
    # Must be set before the import; otherwise NannyML reports its use over the network.
    os.environ["NML_DISABLE_USAGE_LOGGING"] = "1"
    import nannyml

    return nannyml
