"""Metrics by slice. Metrics over all rows can be high although the model predicts one group of rows badly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.runtime import Predictions
from jobs.evaluate.rows import group_values
from jobs.metrics import score


def slice_metrics(
    predictions: Predictions, target: npt.NDArray[Any], *, table: pa.Table, columns: list[str], min_rows: int
) -> dict[str, Any]:
    """Compute the metrics for each value of each column.

    Args:
        predictions: Predictions of the table's rows.
        target: Target of the same rows, encoded as for `metrics.score`.
        table: The evaluated rows, with the columns to slice by.
        columns: Names of the columns to slice by.
        min_rows: Smallest number of rows for which a slice gets metrics. A smaller slice gets only its number of rows,
            and `judged` is false.

    Returns:
        Metrics by column and value, without calibration bins. Values are text; a missing value is `null`.

    Raises:
        TrainingSetError: A column is unknown or has too many values to slice by.
    """
    return {
        column: _metrics_by_value(predictions, target, group_values(table, column), min_rows)
        for column in columns
    }


def smallest_slice(slices: dict[str, Any]) -> dict[str, Any] | None:
    """Return the slice with the fewest rows. Its size shows how reliable the metrics of the slices are."""
    slices_with_rows = [
        {"column": column, "value": value, "rows": metrics["rows"]}
        for column, by_value in slices.items()
        for value, metrics in by_value.items()
    ]
    return min(slices_with_rows, key=lambda slice_: int(slice_["rows"]), default=None)


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
