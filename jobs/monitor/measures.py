"""NannyML's estimators over two plain frames: the reference, and what was served.

CBPE estimates performance from calibrated probabilities, and so cannot see concept drift; realised performance can,
once outcomes are in. Both are reported side by side and neither replaces the other. DLE estimates a regression's error.
Drift is the Jensen-Shannon distance alone: tests with p-values call any difference significant when chunks are large.
A threshold is three standard deviations around the mean of the reference's chunks, an interval three sampling errors to
either side; both are NannyML's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cluster.runtime import Task
from jobs.monitor.frames import PREDICTED, PROBABILITY, SCORE, TIME, TRUTH, Frames

METRICS = {Task.binary: "roc_auc", Task.multiclass: "roc_auc", Task.regression: "rmse"}
SHORT = {"roc_auc": "auc", "rmse": "rmse"}
"""NannyML's name of a metric to ours."""

_PERIOD = "D"
_EXPECTED_WARNINGS = (
    "The resulting number of chunks is too low",  # of the served side, where two late years are two chunks
    "'y_true' contains",  # outcomes that are not in yet
)


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


def estimated(frames: Frames) -> Measures:
    """Estimated performance of each served chunk."""
    nannyml = _nannyml()
    metric = METRICS[frames.task]
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
    with _quietly():
        estimator.fit(frames.reference)
        result = estimator.estimate(frames.served.drop(columns=TRUTH))
    return _measures(result, metric, frames.chunks)


def realised(frames: Frames, *, min_outcomes: int) -> Measures:
    """Realised performance of each served chunk with enough outcomes, over the rows that have one."""
    nannyml = _nannyml()
    metric = METRICS[frames.task]
    known = frames.served.dropna(subset=[TRUTH])
    known = known[known.groupby(TIME)[TRUTH].transform("size") >= min_outcomes]
    if known.empty:
        return {}
    calculator = nannyml.PerformanceCalculator(**_problem(frames), metrics=[metric], chunk_period=_PERIOD)
    with _quietly():
        calculator.fit(frames.reference)
        result = calculator.calculate(known.astype({TRUTH: frames.reference[TRUTH].dtype}))
    return _measures(result, metric, frames.chunks)


def drift(frames: Frames) -> dict[str, Measures]:
    """Distance of each input, and of a binary model's score, from the reference; by column, then chunk."""
    nannyml = _nannyml()
    score = [SCORE] if frames.task is Task.binary else []
    names = [name for name in [*frames.continuous, *frames.categorical, *score] if _has_values(frames, name)]
    calculator = nannyml.UnivariateDriftCalculator(
        column_names=names,
        treat_as_categorical=[name for name in names if name in frames.categorical],
        timestamp_column_name=TIME,
        chunk_period=_PERIOD,
        continuous_methods=["jensen_shannon"],
        categorical_methods=["jensen_shannon"],
    )
    with _quietly():
        calculator.fit(frames.reference)
        table = calculator.calculate(frames.served).filter(period="analysis").to_df()
    # Sorted, because pandas warns of every look-up in the order NannyML gives.
    table = table.sort_index(axis="columns")
    keys = [_chunk(key, frames.chunks) for key in table[("chunk", "chunk", "key")]]
    return {
        name: {
            key: measure
            for key, (_, row) in zip(keys, table[(name, "jensen_shannon")].iterrows(), strict=True)
            if (measure := _measure(row)) is not None
        }
        for name in names
    }


def missing_shares(frames: Frames) -> dict[str, dict[str, float]]:
    """Share of nulls of each number among the inputs, by column and chunk; a distance does not see those."""
    shares = frames.served[frames.continuous].isna().groupby(frames.served[TIME]).mean()
    return {
        str(name): {frames.chunks[position]: float(share) for position, share in enumerate(column)}
        for name, column in shares.items()
    }


def _has_values(frames: Frames, name: str) -> bool:
    return bool(frames.reference[name].notna().any() and frames.served[name].notna().any())


def _problem(frames: Frames) -> dict[str, Any]:
    common = {"y_true": TRUTH, "y_pred": PREDICTED, "timestamp_column_name": TIME}
    match frames.task:
        case Task.binary:
            return common | {"problem_type": "classification_binary", "y_pred_proba": SCORE}
        case Task.multiclass:
            names = [str(name) for name in frames.reference.columns if str(name).startswith(PROBABILITY)]
            scores = {name.removeprefix(PROBABILITY): name for name in names}
            return common | {"problem_type": "classification_multiclass", "y_pred_proba": scores}
        case Task.regression:
            return common | {"problem_type": "regression"}


def _measures(result: Any, metric: str, chunks: list[str]) -> Measures:
    table = result.filter(period="analysis").to_df()
    measures = {_chunk(row["chunk"]["key"], chunks): _measure(row[metric]) for _, row in table.iterrows()}
    return {chunk: measure for chunk, measure in measures.items() if measure is not None}


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


def _chunk(day: str, chunks: list[str]) -> str:
    position = (pd.Timestamp(day) - pd.Timestamp("2000-01-01")).days
    return chunks[int(position)]


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def _nannyml() -> Any:
    # Set before the import, or NannyML reports its use over the network.
    os.environ["NML_DISABLE_USAGE_LOGGING"] = "1"
    import nannyml

    return nannyml
