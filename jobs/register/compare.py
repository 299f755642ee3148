"""Run the artifact itself on the reference rows, in the form in which it was exported, and compare the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from onnx import TensorProto

from cluster.errors import RefusedError
from cluster.runtime.onnx_engine import RUN_ERRORS, first_line
from cluster.runtime.predictions import Scores
from jobs.register.artifact import NUMBERS, TEXT, Artifact, GraphInput, open_session

MAX_ROWS = 20_000
"""At most this many reference rows are compared, evenly spread."""
_BATCH = 4096
_DTYPES: dict[int, type[Any]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.DOUBLE: np.float64,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
    TensorProto.INT16: np.int16,
    TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
    TensorProto.BOOL: np.bool_,
}


def comparable_rows(
    artifact: Artifact,
    columns: list[tuple[GraphInput, list[str]]],
    table: pa.Table,
    *,
    fills: Mapping[int, float],
) -> npt.NDArray[np.int64]:
    """Return the positions of the rows to compare.

    A row with a missing value is left out if the artifact has no form for it, or if registration fills it.

    Args:
        artifact: The original graph.
        columns: Each input of the graph with its columns.
        table: Reference rows.
        fills: Values that replace missing values, by position of the column.
    """
    complete = np.ones(table.num_rows, np.bool_)
    position = 0
    for one, names in columns:
        for name in names:
            if position in fills or one.type not in NUMBERS | {TEXT}:
                complete &= np.asarray(table[name].is_valid())
            position += 1
    rows = np.flatnonzero(complete)
    if len(rows) <= MAX_ROWS:
        return rows
    return rows[np.linspace(0, len(rows) - 1, MAX_ROWS).astype(np.int64)]


def artifact_scores(
    artifact: Artifact, columns: list[tuple[GraphInput, list[str]]], table: pa.Table
) -> Scores:
    """Return the scores of the original graph: [rows], or [rows, classes].

    Raises:
        RefusedError: The graph does not run on these rows.
    """
    session = open_session(artifact.tensor_model)
    feeds = {
        one.name: np.column_stack([_values(table[name], one) for name in names]) for one, names in columns
    }
    size = artifact.fixed_rows or _BATCH
    results = []
    for start in range(0, table.num_rows, size):
        batch = {name: values[start : start + size] for name, values in feeds.items()}
        rows = len(next(iter(batch.values())))
        if artifact.fixed_rows:
            batch = {
                name: np.concatenate([v, np.repeat(v[-1:], size - rows, axis=0)]) for name, v in batch.items()
            }
        try:
            found = session.run([artifact.output], batch)[0]
        except RUN_ERRORS as error:
            raise RefusedError(
                f"The artifact does not run on the reference rows: {first_line(error)}"
            ) from error
        results.append(np.asarray(found, dtype=np.float64)[:rows])
    scores = np.concatenate(results)
    return scores[:, 0] if scores.ndim == 2 and scores.shape[1] == 1 else scores


def _values(column: pa.ChunkedArray, one: GraphInput) -> npt.NDArray[Any]:
    if one.type == TEXT:
        return np.array(
            ["" if text is None else text for text in column.cast(pa.string()).to_pylist()], dtype=object
        )
    dtype = _DTYPES[one.type]
    if one.type in NUMBERS:
        return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=dtype)
    return np.asarray(column.to_numpy(), dtype=dtype)
