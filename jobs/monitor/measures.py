"""NannyML's estimators over two plain frames: the reference, and what was served.

CBPE estimates performance from calibrated probabilities, and so cannot see concept drift; realised performance can,
once outcomes are in. Both are reported side by side and neither replaces the other. DLE estimates a regression's error.
Drift is the Jensen-Shannon distance alone: tests with p-values call any difference significant when chunks are large.
A threshold is three standard deviations around the mean of the reference's chunks, an interval three sampling errors to
either side; both are NannyML's.

Each figure fails alone. One that is not defined has a reason instead of a value and raises no alert.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from cluster.runtime import Task
from jobs.monitor.frames import PREDICTED, PROBABILITY, SCORE, TIME, TRUTH, Frames

LOG = logging.getLogger("falaj.monitor")
METRICS = {Task.binary: "roc_auc", Task.multiclass: "roc_auc", Task.regression: "rmse"}
SHORT = {"roc_auc": "auc", "rmse": "rmse"}
"""NannyML's name of a metric to ours."""
MIN_OF_CLASS = 2
"""Rows of each class that NannyML's calibration splits the reference by."""
MIN_DEFINED = 3
"""Chunks of the reference that need a value before their deviation is a threshold."""

_PERIOD = "D"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One figure of one chunk, with what it is held against."""

    value: float
    lower: float | None
    upper: float | None
    """Ends of the interval that sampling alone explains; none for a distance."""
    lower_threshold: float | None
    upper_threshold: float | None
    alert: bool
    """The value is beyond a threshold."""


Measures = dict[str, Measure]
"""By chunk; a chunk whose figure is not defined is absent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure of all chunks."""

    measures: Measures = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Chunk to why it has no value, or none that it could be held against."""


def estimated(frames: Frames) -> Figure:
    """Estimated performance of each served chunk; needs a reference with all classes, and no outcomes."""
    usable = scored(frames)
    if fault := _estimate_fault(frames, usable):
        return _undefined(frames, fault)
    nannyml, metric = _nannyml(), METRICS[frames.task]
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
    _, fault = _attempt(lambda: estimator.fit(usable), "the estimator cannot be fitted to the reference")
    if fault:
        return _undefined(frames, fault)
    return _by_chunk(frames, metric, lambda day: estimator.estimate(served[served[TIME] == day]))


def realised(frames: Frames, *, min_outcomes: int) -> Figure:
    """Realised performance of each served chunk with enough outcomes, over the rows that have one."""
    metric = METRICS[frames.task]
    known = frames.served.dropna(subset=[TRUTH])
    reasons = {
        chunk: reason
        for chunk, day in _chunk_days(frames)
        if (reason := _outcome_fault(frames, known[known[TIME] == day], min_outcomes))
    }
    if len(reasons) == len(frames.chunks):
        return Figure(reasons=reasons)
    usable = scored(frames)
    fault = frames.reference_fault or _class_fault(frames, usable, least=1)
    calculator: Any = None
    if not frames.reference_fault and not usable.empty:
        calculator = _nannyml().PerformanceCalculator(
            **_problem(frames), metrics=[metric], chunk_period=_PERIOD
        )
        _, failed = _attempt(lambda: calculator.fit(usable), "the reference cannot be measured")
        if failed:
            fault, calculator = failed, None
    if calculator is None:
        without = f"no threshold: {fault or 'the reference has no scored row with a label'}"
        measures = {
            chunk: _without_threshold(_score(frames, known[known[TIME] == day]))
            for chunk, day in _chunk_days(frames)
            if chunk not in reasons
        }
        return Figure(measures=measures, reasons=reasons | dict.fromkeys(measures, without))
    typed = known.astype({TRUTH: usable[TRUTH].dtype})
    figure = _by_chunk(
        frames, metric, lambda day: calculator.calculate(typed[typed[TIME] == day]), skipped=reasons
    )
    if fault:  # what NannyML makes of a reference without one class is no threshold
        measures = {chunk: _without_threshold(one.value) for chunk, one in figure.measures.items()}
        return Figure(
            measures=measures, reasons=figure.reasons | dict.fromkeys(measures, f"no threshold: {fault}")
        )
    return figure


def drift(frames: Frames) -> dict[str, Figure]:
    """Distance of each input, and of a binary model's score, from the reference; by column, then chunk."""
    figures = {name: _undefined(frames, reason) for name, reason in frames.unusable.items()}
    score = [SCORE] if frames.task is Task.binary else []
    for name in [*frames.continuous, *frames.categorical, *score]:
        figures[name] = _drift(frames, name)
    return figures


def _drift(frames: Frames, name: str) -> Figure:
    if name not in frames.reference or not frames.reference[name].notna().any():
        return _undefined(frames, "no values in the reference")
    present = frames.served[name].notna().groupby(frames.served[TIME]).any()
    empty = {
        chunk: "undefined: no values in this chunk"
        for chunk, day in _chunk_days(frames)
        if not present.get(day, False)
    }
    if len(empty) == len(frames.chunks):
        return Figure(reasons=empty)
    calculator = _nannyml().UnivariateDriftCalculator(
        column_names=[name],
        treat_as_categorical=[name] if name in frames.categorical else [],
        timestamp_column_name=TIME,
        chunk_period=_PERIOD,
        continuous_methods=["jensen_shannon"],
        categorical_methods=["jensen_shannon"],
    )
    both = [name, TIME]  # other columns' nulls are their own affair
    reference = frames.reference[both].dropna(subset=[name])
    served = frames.served[both].dropna(subset=[name])
    _, fault = _attempt(lambda: calculator.fit(reference), "the reference cannot be measured")
    if fault:
        return _undefined(frames, fault)
    result, fault = _attempt(lambda: calculator.calculate(served), "it cannot be measured")
    return (
        _undefined(frames, fault)
        if fault
        else _figure(result, (name, "jensen_shannon"), frames.chunks, reasons=empty)
    )


def scored(frames: Frames) -> pd.DataFrame:
    """The reference's rows with a label and a finite score: those that performance is held against."""
    if frames.reference_fault:
        return frames.reference.head(0)
    scores = [SCORE] if frames.task is Task.binary else [PREDICTED]
    if frames.task is Task.multiclass:
        scores = _probabilities(frames.reference)
    finite = np.isfinite(frames.reference[scores].to_numpy(dtype=float)).all(axis=1)
    rows = frames.reference[finite & frames.reference[TRUTH].notna().to_numpy()]
    return rows if frames.task is Task.multiclass else rows.astype({TRUTH: float})


def _estimate_fault(frames: Frames, usable: pd.DataFrame) -> str:
    """Why no estimate can be made; empty where one can be tried."""
    if frames.reference_fault:
        return frames.reference_fault
    if usable.empty:
        return "the reference has no scored row with a label"
    if frames.task is Task.regression and not frames.continuous + frames.categorical:
        return "no input can be measured"
    return _class_fault(frames, usable, least=MIN_OF_CLASS)


def _class_fault(frames: Frames, usable: pd.DataFrame, *, least: int) -> str:
    """Which class the reference has too few rows of."""
    if frames.task is Task.regression or usable.empty:
        return ""
    counts = usable[TRUTH].value_counts()
    if frames.task is Task.binary:
        rows = {f"{one} class": int(counts.get(code, 0)) for one, code in (("negative", 0), ("positive", 1))}
    else:
        names = [name.removeprefix(PROBABILITY) for name in _probabilities(frames.reference)]
        rows = {f"class '{name}'": int(counts.get(name, 0)) for name in names}
    few = [
        f"{count or 'no'} row{'s' * (count != 1)} of {name}" for name, count in rows.items() if count < least
    ]
    return f"the reference has {few[0]}" if few else ""


def _outcome_fault(frames: Frames, known: pd.DataFrame, min_outcomes: int) -> str:
    """Why the outcomes of a chunk say nothing; empty where they do."""
    if len(known) < min_outcomes:
        return f"too few outcomes: {len(known)} of {min_outcomes}"
    if frames.task is Task.regression:
        return ""
    classes = known[TRUTH].nunique()
    if classes == 1:
        return "undefined: one class in this chunk"
    wanted = 2 if frames.task is Task.binary else len(_probabilities(frames.served))
    return "" if classes == wanted else f"undefined: {classes} of {wanted} classes in this chunk"


def _score(frames: Frames, rows: pd.DataFrame) -> float:
    """The metric itself, where there is no reference to hold it against."""
    from sklearn.metrics import mean_squared_error, roc_auc_score

    match frames.task:
        case Task.binary:
            return float(roc_auc_score(rows[TRUTH].astype(float), rows[SCORE]))
        case Task.multiclass:
            columns = sorted(_probabilities(rows))
            names = [name.removeprefix(PROBABILITY) for name in columns]
            return float(roc_auc_score(rows[TRUTH], rows[columns], multi_class="ovr", labels=names))
        case Task.regression:
            return float(mean_squared_error(rows[TRUTH], rows[PREDICTED]) ** 0.5)


def _by_chunk(
    frames: Frames,
    name: str,
    measured: Callable[[Any], Any],
    *,
    skipped: dict[str, str] | None = None,
) -> Figure:
    """A figure of each chunk by itself: fitted once and asked chunk by chunk, NannyML gives what it gives for all.

    Args:
        frames: whose chunks.
        name: NannyML's, of the figure.
        measured: NannyML's result for the rows of a day.
        skipped: chunks that are not asked for, with the reason.
    """
    parts = []
    reasons = dict(skipped or {})
    for chunk, day in _chunk_days(frames):
        if chunk in reasons:
            continue
        result, fault = _attempt(functools.partial(measured, day), "it cannot be measured")
        if fault:
            reasons[chunk] = f"undefined: {fault}"
        else:
            parts.append(_figure(result, name, [chunk], reasons={}))
    return Figure(
        measures={chunk: one for part in parts for chunk, one in part.measures.items()},
        reasons=reasons | {chunk: reason for part in parts for chunk, reason in part.reasons.items()},
    )


def _figure(
    result: Any, name: str | tuple[str, str], chunks: list[str], *, reasons: dict[str, str]
) -> Figure:
    """A figure as NannyML has it: a row for each of these chunks that no reason leaves out."""
    # Sorted, because pandas warns of every look-up in the order NannyML gives.
    table = result.filter(period="analysis").to_df().sort_index(axis="columns")[name]
    left = [chunk for chunk in chunks if chunk not in reasons]
    reasons, measures = dict(reasons), {}
    defined = _num_defined(result, name)
    for chunk, (_, row) in zip(left, table.iterrows(), strict=True):
        measure = _measure(row)
        if measure is None:
            reasons[chunk] = "undefined: NannyML gives no value"
            continue
        if defined < MIN_DEFINED:
            reasons[chunk] = f"no threshold: {defined} of the reference's chunks have a value"
            measure = replace(measure, lower_threshold=None, upper_threshold=None, alert=False)
        measures[chunk] = measure
    return Figure(measures=measures, reasons=reasons)


def _attempt(step: Callable[[], Any], what: str) -> tuple[Any, str]:
    """What a step gives, or why it failed: without a word of NannyML's, which may quote a value, for the ledger."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of single chunks is in the reasons
            return step(), ""
    except Exception as error:
        LOG.warning("%s", what, exc_info=error)
        return None, f"{what} ({type(error).__name__}; the job's output says more)"


def _undefined(frames: Frames, reason: str) -> Figure:
    return Figure(reasons=dict.fromkeys(frames.chunks, f"undefined: {reason}"))


def _without_threshold(value: float) -> Measure:
    return Measure(
        value=value, lower=None, upper=None, lower_threshold=None, upper_threshold=None, alert=False
    )


def _chunk_days(frames: Frames) -> Iterator[tuple[str, pd.Timestamp]]:
    for position, chunk in enumerate(frames.chunks):
        yield chunk, pd.Timestamp("2000-01-01") + pd.Timedelta(days=position)


def _probabilities(frame: pd.DataFrame) -> list[str]:
    return [str(name) for name in frame.columns if str(name).startswith(PROBABILITY)]


def _problem(frames: Frames) -> dict[str, Any]:
    common = {"y_true": TRUTH, "y_pred": PREDICTED, "timestamp_column_name": TIME}
    match frames.task:
        case Task.binary:
            return common | {"problem_type": "classification_binary", "y_pred_proba": SCORE}
        case Task.multiclass:
            scores = {name.removeprefix(PROBABILITY): name for name in _probabilities(frames.reference)}
            return common | {"problem_type": "classification_multiclass", "y_pred_proba": scores}
        case Task.regression:
            return common | {"problem_type": "regression"}


def _num_defined(result: Any, name: str | tuple[str, str]) -> int:
    """Chunks of the reference that have a value."""
    table = result.filter(period="reference").to_df().sort_index(axis="columns")
    part = table[name]
    column = next(name for name in ("realized", "value") if name in part.columns)
    return int(np.isfinite(part[column].to_numpy(dtype=float)).sum())


def _measure(row: Any) -> Measure | None:
    value = _number(row.get("value"))
    if value is None:
        return None
    lower, upper = (
        _number(row.get("lower_confidence_boundary")),
        _number(row.get("upper_confidence_boundary")),
    )
    error = _number(row.get("sampling_error"))
    if error is not None and lower is None and upper is None:
        lower, upper = value - 3 * error, value + 3 * error
    return Measure(
        value=value,
        lower=lower,
        upper=upper,
        lower_threshold=_number(row.get("lower_threshold")),
        upper_threshold=_number(row.get("upper_threshold")),
        alert=bool(row["alert"]),
    )


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _nannyml() -> Any:
    # Set before the import, or NannyML reports its use over the network.
    os.environ["NML_DISABLE_USAGE_LOGGING"] = "1"
    import nannyml

    return nannyml
