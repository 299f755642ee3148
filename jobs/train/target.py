"""The label column as a target: class positions, or values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import TrainingSetError
from cluster.runtime import Task
from cluster.runtime.signature import Label

Target = npt.NDArray[np.int64] | npt.NDArray[np.float64]

MAX_CLASSES = 1000


def learn_classes(task: Task, column: pa.ChunkedArray, *, label: str) -> tuple[Label, ...] | None:
    """The classes of a label column in ascending order; none for a regression.

    Raises:
        TrainingSetError: missing labels, or values that do not fit the task.
    """
    if column.null_count:
        raise TrainingSetError(f"Label '{label}' is missing in {column.null_count} of {len(column)} rows.")
    if task is Task.regression:
        _values(column, label)
        return None
    classes = _classes(column, label)
    if task is Task.binary and len(classes) != 2:
        raise TrainingSetError(
            f"A binary task needs a label with two values, '{label}' has {len(classes)}: {_some(classes)}. "
            "Set task=multiclass or task=regression, or choose another label."
        )
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise TrainingSetError(
            f"A multiclass task needs 2 to {MAX_CLASSES} classes, '{label}' has {len(classes)}: {_some(classes)}."
        )
    return classes


def encode_target(
    task: Task, column: pa.ChunkedArray, *, classes: tuple[Label, ...] | None, label: str
) -> Target:
    """Class positions, int64 [rows], or a regression's values, float64 [rows].

    Raises:
        TrainingSetError: a label that is missing or was not among the classes.
    """
    if column.null_count:
        raise TrainingSetError(f"Label '{label}' is missing in {column.null_count} of {len(column)} rows.")
    if task is Task.regression or classes is None:
        return _values(column, label)
    positions = {value: position for position, value in enumerate(classes)}
    try:
        codes = [positions[value] for value in column.to_pylist()]
    except KeyError as error:
        raise TrainingSetError(
            f"Label '{label}' has the value {error}, the model knows {_some(classes)}."
        ) from error
    return np.array(codes, dtype=np.int64)


def _values(column: pa.ChunkedArray, label: str) -> npt.NDArray[np.float64]:
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise TrainingSetError(f"A regression needs a number as its label, '{label}' is {kind}.")
    values = np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)
    if not np.isfinite(values).all():
        raise TrainingSetError(f"Label '{label}' holds values that are not finite.")
    if len(values) and np.abs(values).max() > np.finfo(np.float32).max:
        raise TrainingSetError(f"Label '{label}' holds values beyond what a float32 can hold; scale it down.")
    return values


def _classes(column: pa.ChunkedArray, label: str) -> tuple[Label, ...]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):
        _values(column, label)
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(kind)):
        raise TrainingSetError(
            f"Label '{label}' is {kind}; a class must be a text, a whole number or a boolean."
        )
    distinct: list[Any] = pc.unique(column).to_pylist()
    if pa.types.is_floating(kind):
        if any(not value.is_integer() for value in distinct):
            raise TrainingSetError(
                f"Label '{label}' holds fractions, which are no classes. Set task=regression."
            )
        distinct = [int(value) for value in distinct]
    return tuple(sorted(distinct))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _some(classes: tuple[Label, ...]) -> str:
    shown = ", ".join(repr(value) for value in classes[:8])
    return f"{shown}, …" if len(classes) > 8 else shown
