"""Encode the label column as a target: for each row, the index of its class, or its value in a regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import TrainingSetError, did_you_mean
from cluster.runtime import Task
from cluster.runtime.signature import Label
from jobs.train.rows.arrow_types import is_text, value_type

if TYPE_CHECKING:
    from jobs.train.rows.file import RowFile

Target = npt.NDArray[np.int64] | npt.NDArray[np.float64]

MAX_CLASSES = 1000
"""A multiclass label may have at most this many classes."""


def label_column(table: pa.Table | RowFile, label: str) -> pa.ChunkedArray:
    """Return the label column.

    Raises:
        TrainingSetError: The table has no such column.
    """
    if label not in table.column_names:
        raise TrainingSetError(
            f"The training set has no label '{label}'.{did_you_mean(label, table.column_names)}"
        )
    return table[label]


def learn_classes(task: Task, column: pa.ChunkedArray, *, label: str) -> tuple[Label, ...] | None:
    """Return the classes of a label column in ascending order, or None for a regression.

    Raises:
        TrainingSetError: The label has nulls, or values that do not fit the task.
    """
    _refuse_nulls(column, label)
    if task is Task.regression:
        _values(column, label)
        return None
    classes = _classes(column, label)
    if task is Task.binary and len(classes) != 2:
        raise TrainingSetError(
            f"A binary task needs a label with two values, '{label}' has {len(classes)}: {_first_classes(classes)}. "
            "Set task=multiclass or task=regression, or choose another label."
        )
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise TrainingSetError(
            f"A multiclass task needs 2 to {MAX_CLASSES} classes, '{label}' has {len(classes)}: "
            f"{_first_classes(classes)}."
        )
    return classes


def encode_target(
    task: Task, column: pa.ChunkedArray, *, classes: tuple[Label, ...] | None, label: str
) -> Target:
    """Return the target, with one element for each row.

    For a classification, an element is the index of the row's class in `classes` (int64). For a regression, it is the
    label's value (float64).

    Raises:
        TrainingSetError: A label is null or is not one of the classes.
    """
    _refuse_nulls(column, label)
    if task is Task.regression or classes is None:
        return _values(column, label)
    positions = {value: position for position, value in enumerate(classes)}
    try:
        codes = [positions[value] for value in column.to_pylist()]
    except KeyError as error:
        raise TrainingSetError(
            f"Label '{label}' has the value {error}, but the model only knows {_first_classes(classes)}."
        ) from error
    return np.array(codes, dtype=np.int64)


def _refuse_nulls(column: pa.ChunkedArray, label: str) -> None:
    if column.null_count:
        raise TrainingSetError(f"Label '{label}' is missing in {column.null_count} of {len(column)} rows.")


def _values(column: pa.ChunkedArray, label: str) -> npt.NDArray[np.float64]:
    dtype = column.type
    if not (pa.types.is_integer(dtype) or pa.types.is_floating(dtype)):
        raise TrainingSetError(f"A regression needs a number as its label, '{label}' is {dtype}.")
    values = np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
    if not np.isfinite(values).all():
        raise TrainingSetError(f"Label '{label}' has values that are not finite.")
    if len(values) and np.abs(values).max() > np.finfo(np.float32).max:
        raise TrainingSetError(f"Label '{label}' has values beyond the range of float32. Scale it down.")
    return values


def _classes(column: pa.ChunkedArray, label: str) -> tuple[Label, ...]:
    dtype = value_type(column)
    column = column.cast(dtype)
    if pa.types.is_floating(dtype):
        _values(column, label)
    elif not (pa.types.is_integer(dtype) or pa.types.is_boolean(dtype) or is_text(dtype)):
        raise TrainingSetError(
            f"Label '{label}' is {dtype}; a class must be text, a whole number or a boolean."
        )
    distinct: list[Any] = pc.unique(column).to_pylist()
    if pa.types.is_floating(dtype):
        if any(not value.is_integer() for value in distinct):
            raise TrainingSetError(
                f"Label '{label}' has fractions, which cannot be classes. Set task=regression."
            )
        distinct = [int(value) for value in distinct]
    return tuple(sorted(distinct))


def _first_classes(classes: tuple[Label, ...]) -> str:
    shown = ", ".join(repr(value) for value in classes[:8])
    return f"{shown}, …" if len(classes) > 8 else shown
