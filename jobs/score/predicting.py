"""Predict for the rows of a chunk, with the answers that a replica gives for each row.

An int8 model has one scale for all activations of a call, so its answer depends on the other rows of the call. A
replica calls it once for each request. So here it is called once for each row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from cluster.errors import FalajError, InvalidRequest, ModelFailed, RefusedError
from cluster.runtime import Model, Precision, Predictions, Task
from cluster.runtime.encoding import Matrix
from cluster.runtime.predictions import Scores
from jobs.score.inputs import ModelRows
from jobs.score.set_aside import Reasons, take

BATCH_ROWS = 65_536


def predict(model: Model, rows: ModelRows, reasons: Reasons) -> tuple[ModelRows, Predictions]:
    """Predict for all rows. Rows that cannot be encoded, or that get no finite score, are set aside.

    Returns:
        The rows with a score, and their predictions.

    Raises:
        InvalidRequest: An input is missing, or its column has the wrong type.
        TooManyBadRows: More rows are bad than allowed.
    """
    model.encode(rows.table.slice(0, 0))  # a wrong column fails for all rows, so it is refused here
    parts = [
        _predict_batch(model, rows, start, min(start + BATCH_ROWS, rows.positions.size), reasons)
        for start in range(0, rows.positions.size, BATCH_ROWS)
    ]
    scores = np.concatenate(parts) if parts else model.predict_matrix(_no_rows(model)).scores
    good = reasons.good[rows.positions]
    if not good.all():
        kept = np.flatnonzero(good)
        rows, scores = ModelRows(rows.positions[kept], take(rows.table, kept)), scores[kept]
    return rows, Predictions(signature=model.signature, scores=scores)


def _predict_batch(model: Model, rows: ModelRows, start: int, stop: int, reasons: Reasons) -> Scores:
    """Return the scores of some rows. A row that is set aside has NaN."""
    table, positions = rows.table.slice(start, stop - start), rows.positions[start:stop]
    try:
        matrix = model.encode(table)
        usable = np.arange(len(positions))
    except InvalidRequest:
        reasons.reject_failing(positions, _encoding(model, table), InvalidRequest)
        usable = np.flatnonzero(reasons.good[positions])
        matrix = model.encode(take(table, usable))
    scores = np.full((len(positions), *_score_shape(model)), np.nan)
    scores[usable] = _scores(model, matrix, positions[usable], reasons)
    finite = np.isfinite(scores[usable]).reshape(usable.size, -1).all(axis=1)
    reasons.reject(positions[usable[~finite]], "the model gave no finite score")
    return scores


def _scores(model: Model, matrix: Matrix, positions: np.ndarray, reasons: Reasons) -> Scores:
    """Return the scores of encoded rows. A row for which the model fails has NaN."""
    if model.signature.precision is Precision.int8:
        return _scores_one_by_one(model, matrix, positions, reasons)
    try:
        return model.predict_matrix(matrix).scores
    except (ModelFailed, RefusedError):
        results = np.full((len(matrix), *_score_shape(model)), np.nan)

        def attempt(start: int, stop: int) -> None:
            results[start:stop] = model.predict_matrix(matrix[start:stop]).scores

        reasons.reject_failing(positions, attempt, ModelFailed, RefusedError, reason=_failed)
        return results


_FAILED = "the model does not run on the row"


def _failed(_: FalajError) -> str:
    return _FAILED


def _scores_one_by_one(model: Model, matrix: Matrix, positions: np.ndarray, reasons: Reasons) -> Scores:
    """Return the scores of encoded rows, with one call for each row. A row for which the model fails has NaN."""
    results = np.full((len(matrix), *_score_shape(model)), np.nan)
    failed: list[int] = []
    for row in range(len(matrix)):
        try:
            results[row] = model.predict_matrix(matrix[row : row + 1]).scores[0]
        except (ModelFailed, RefusedError):
            failed.append(row)
    reasons.reject(positions[failed], _FAILED)
    return results


def _encoding(model: Model, table: pa.Table) -> Callable[[int, int], None]:
    def attempt(start: int, stop: int) -> None:
        model.encode(table.slice(start, stop - start))

    return attempt


def _score_shape(model: Model) -> tuple[int, ...]:
    return (model.signature.num_scores,) if model.signature.task is Task.multiclass else ()


def _no_rows(model: Model) -> Matrix:
    return np.empty((0, model.signature.width), dtype=np.float32)


def answer_columns(predictions: Predictions) -> dict[str, pa.Array]:
    """Return the predictions as columns, with the names and values of a replica's answer.

    Binary: `probability` and `label`. Multiclass: `probabilities`, a struct by class, and `label`. Regression: `value`.
    """
    signature, scores = predictions.signature, predictions.scores
    if signature.task is Task.regression:
        return {"value": pa.array(scores, pa.float64())}
    label = pa.array(list(signature.classes or ())).take(pa.array(predictions.class_codes()))
    if signature.task is Task.binary:
        return {"probability": pa.array(scores, pa.float64()), "label": label}
    by_class = [
        pa.array(np.ascontiguousarray(scores[:, code]), pa.float64()) for code in range(scores.shape[1])
    ]
    names = [str(name) for name in signature.classes or ()]
    return {"probabilities": pa.StructArray.from_arrays(by_class, names=names), "label": label}
