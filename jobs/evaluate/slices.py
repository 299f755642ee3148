"""The same metrics for each group of people: a good average can hide a group the model fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import TrainingSetError, did_you_mean
from cluster.runtime import Predictions
from jobs.metrics import score

MAX_VALUES = 100


def slice_metrics(
    predictions: Predictions, target: npt.NDArray[Any], *, table: pa.Table, columns: list[str], min_rows: int
) -> dict[str, Any]:
    """Metrics by value of each column.

    Args:
        predictions: of the table's rows.
        target: as `metrics.score` takes it.
        table: the evaluated rows, with the columns to slice by.
        columns: names in the table.
        min_rows: a smaller slice is listed with its number of rows, but not judged.

    Returns:
        Column to value (as text, `null` where missing) to metrics; the calibration bins are left out.

    Raises:
        TrainingSetError: an unknown column, or one with too many values to slice by.
    """
    return {column: _by_value(predictions, target, _values(table, column), min_rows) for column in columns}


def smallest_slice(slices: dict[str, Any]) -> dict[str, Any] | None:
    """The slice with the fewest rows, so that a reader knows how far the figures carry."""
    named = [
        {"column": column, "value": value, "rows": metrics["rows"]}
        for column, by_value in slices.items()
        for value, metrics in by_value.items()
    ]
    return min(named, key=lambda one: int(one["rows"]), default=None)


def _values(table: pa.Table, column: str) -> npt.NDArray[np.str_]:
    if column not in table.column_names:
        raise TrainingSetError(
            f"The training set has no column '{column}' to slice by.{did_you_mean(column, table.column_names)}"
        )
    values = np.array(
        ["null" if value is None else str(value) for value in table.column(column).to_pylist()], dtype=np.str_
    )
    if len(np.unique(values)) > MAX_VALUES:
        raise TrainingSetError(
            f"Column '{column}' has more than {MAX_VALUES} different values; slice by a column with fewer."
        )
    return values


def _by_value(
    predictions: Predictions, target: npt.NDArray[Any], values: npt.NDArray[np.str_], min_rows: int
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for value in np.unique(values):
        inside = values == value
        if inside.sum() < min_rows:
            result[str(value)] = {"rows": int(inside.sum()), "judged": False}
            continue
        part = Predictions(signature=predictions.signature, scores=predictions.scores[inside])
        metrics = score(part, target[inside])
        metrics.pop("calibration", None)
        result[str(value)] = metrics | {"judged": True}
    return result
