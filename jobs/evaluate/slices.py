"""Metrics by slice: a good average can hide a group of rows for which the model is bad."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import TrainingSetError, did_you_mean
from cluster.runtime import Predictions
from jobs.metrics import score

MAX_VALUES = 100
"""Largest number of values of a column to slice by."""


def slice_metrics(
    predictions: Predictions, target: npt.NDArray[Any], *, table: pa.Table, columns: list[str], min_rows: int
) -> dict[str, Any]:
    """Compute the metrics for each value of each column.

    Args:
        predictions: Predictions of the table's rows.
        target: Target as `metrics.score` takes it.
        table: The evaluated rows, with the columns to slice by.
        columns: Names of the columns to slice by.
        min_rows: For a smaller slice only the number of rows is returned, with `judged` false.

    Returns:
        Metrics by column and value, without calibration bins. Values are text; a missing value is `null`.

    Raises:
        TrainingSetError: A column is unknown or has too many values to slice by.
    """
    return {
        column: _metrics_by_value(predictions, target, _values(table, column), min_rows) for column in columns
    }


def smallest_slice(slices: dict[str, Any]) -> dict[str, Any] | None:
    """Return the slice with the fewest rows, which shows how reliable the metrics are."""
    slices_with_rows = [
        {"column": column, "value": value, "rows": metrics["rows"]}
        for column, by_value in slices.items()
        for value, metrics in by_value.items()
    ]
    return min(slices_with_rows, key=lambda slice_: int(slice_["rows"]), default=None)


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


def _metrics_by_value(
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
