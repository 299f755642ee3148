"""The rows that an evaluation uses, encoded, and the entities that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.errors import TrainingSetError, did_you_mean
from cluster.registry import ModelVersion
from cluster.runtime import Model, Predictions
from cluster.runtime.encoding import Matrix
from jobs.train.config import SplitConfig
from jobs.train.data import TrainingSet
from jobs.train.rows.target import Target, encode_target, label_column
from jobs.train.split import Mask, recorded_split, resolve_split
from jobs.train.version_rows import has_no_split

MAX_VALUES = 100
"""A column that defines groups may have at most this many values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRows:
    """Rows with the model's predictions and the true target."""

    table: pa.Table
    matrix: Matrix
    predictions: Predictions
    target: Target


def score_rows(model: Model, table: pa.Table) -> ScoredRows:
    """Encode rows, predict them, and read their label.

    Raises:
        TrainingSetError: There are no rows, or a label is missing or unknown.
        InvalidRequest: An input is missing or has a wrong type.
    """
    if not table.num_rows:
        raise TrainingSetError("There are no rows to evaluate. Name another data set or another `split`.")
    signature, matrix = model.signature, model.encode(table)
    labels = label_column(table, signature.label)
    return ScoredRows(
        table=table,
        matrix=matrix,
        predictions=model.predict_matrix(matrix).require_finite(),
        target=encode_target(signature.task, labels, classes=signature.classes, label=signature.label),
    )


def select(source: TrainingSet, mask: Mask) -> pa.Table:
    """Return the rows of a mask."""
    return source.table.filter(pa.array(mask))


def entity_columns(version: ModelVersion, source: TrainingSet, configured: list[str] | None) -> list[str]:
    """Return the columns whose values together name the entity of a row; empty if each row is its own entity.

    The columns are the configured ones, or the split's column if it is a join key, or the join keys, or the split's
    column.

    Raises:
        TrainingSetError: A configured column is missing.
    """
    known = source.table.column_names
    if configured is not None:
        for name in configured:
            if name not in known:
                raise TrainingSetError(f"The data has no column '{name}'.{did_you_mean(name, known)}")
        return configured
    keys = [name for name in source.join_keys if name in known]
    # A registered artifact has no split, but its reference may have a key by which training would split.
    split = (
        resolve_split(SplitConfig(), source) if has_no_split(version) else recorded_split(version, source)
    ).column
    if split in known and (split in keys or not keys):
        return [str(split)]
    return keys


def entity_numbers(table: pa.Table, columns: list[str]) -> npt.NDArray[np.int64]:
    """Return the number of each row's entity, from 0."""
    if not columns:
        return np.arange(table.num_rows, dtype=np.int64)
    numbers = np.zeros(table.num_rows, dtype=np.int64)
    for name in columns:
        codes = table.column(name).combine_chunks().dictionary_encode(null_encoding="encode").indices
        values = np.asarray(codes.to_numpy(zero_copy_only=False), dtype=np.int64)
        numbers = np.unique(numbers * (int(values.max()) + 1) + values, return_inverse=True)[1]
    return np.asarray(np.unique(numbers, return_inverse=True)[1], dtype=np.int64)


def group_values(table: pa.Table, column: str) -> npt.NDArray[np.str_]:
    """Return a column's values as text; a missing value is `null`.

    Raises:
        TrainingSetError: The column is unknown or has too many values to define groups.
    """
    if column not in table.column_names:
        raise TrainingSetError(
            f"The training set has no column '{column}' to slice by.{did_you_mean(column, table.column_names)}"
        )
    values: Any = ["null" if value is None else str(value) for value in table.column(column).to_pylist()]
    texts = np.array(values, dtype=np.str_)
    if len(np.unique(texts)) > MAX_VALUES:
        raise TrainingSetError(
            f"Column '{column}' has more than {MAX_VALUES} different values; slice by a column with fewer."
        )
    return texts
