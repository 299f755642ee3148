"""Check a data set before a model is fitted to it.

Data is refused if a model cannot be fitted to it or evaluated on it. Data gives a warning if it would make a model look
better than it is. The checks read the encoded matrix, so they see the same values as the model. The search for leaks
uses a sample of the rows.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import TrainingSetError
from cluster.runtime import Task
from jobs.metrics import roc_auc
from jobs.train.training_data import TrainingData

Floats = npt.NDArray[np.float32]
Target = npt.NDArray[Any]

MIN_ROWS = 20
"""An input with fewer non-missing values is not checked for leaks."""
MIN_OF_CLASS = 5
"""Smallest number of rows of the rarer class, and smallest mean number of rows per value. With fewer rows, an input may
predict the label perfectly by chance."""
LEAK_AUC = 0.999
"""An input with at least this AUC, in either direction, is a leak."""
LEAK_RANK_CORRELATION = 0.9999
"""An input with at least this absolute rank correlation with the label is a leak."""
LEAK_ERRORS = 0.01
"""An input is a leak if E1 / E2 is at most this. E1 is the number of errors of a prediction that, for each value of the
input, always predicts its most frequent class. E2 is the same without the input: for the most frequent class of all
rows."""


def check_rows(data: TrainingData) -> list[str]:
    """Check that a model can be fitted to the data and evaluated on it.

    Returns:
        Warnings, one sentence each.

    Raises:
        TrainingSetError: The label has only one value in the rows to fit on, or only one class in the held-out rows.
    """
    return [
        *_check_target(data),
        *_conflicting_labels(data),
        *_duplicate_inputs(data),
        *_constant_inputs(data),
        *_leaking_inputs(data),
    ]


def _check_target(data: TrainingData) -> list[str]:
    label, task = data.signature.label, data.signature.task
    fit, held_out = data.target[data.fit], data.target[data.held_out]
    if len(np.unique(fit)) < 2:
        raise TrainingSetError(
            f"All {len(fit)} rows to fit on have the same value of label '{label}', so there is nothing to learn. "
            "Choose another label or another `split`."
        )
    if task is Task.regression:
        constant = len(np.unique(held_out)) < 2
        return [f"label '{label}' has one value in the held-out rows, so r2 is undefined"] if constant else []
    if len(np.unique(held_out)) < 2:
        raise TrainingSetError(
            f"All {len(held_out)} held-out rows have the same class of label '{label}', so auc is undefined and the "
            "model cannot be evaluated. Set another `split.column`; `split.column=null` draws rows by the seed."
        )
    return [
        f"no {part} row has label '{label}' = {', '.join(absent)}"
        for part, rows in (("training", fit), ("held-out", held_out))
        if (absent := _absent_classes(data, rows))
    ]


def _absent_classes(data: TrainingData, rows: Target) -> list[str]:
    present = set(np.unique(rows).tolist())
    return [repr(name) for code, name in enumerate(data.signature.classes or ()) if code not in present]


def _conflicting_labels(data: TrainingData) -> list[str]:
    count = data.num_conflicts
    return [f"{count} rows have the same entity and time as another row, and another label"] if count else []


def _duplicate_inputs(data: TrainingData) -> list[str]:
    """Return a warning for each group of inputs that are equal in all rows to fit on."""
    names_by_values: dict[str, list[str]] = defaultdict(list)
    for name, digest in zip(data.signature.matrix_names, data.statistics.column_digests, strict=True):
        names_by_values[digest].append(name)
    return [
        f"inputs {', '.join(map(repr, names))} have the same values; one of them is enough"
        for names in names_by_values.values()
        if len(names) > 1
    ]


def _constant_inputs(data: TrainingData) -> list[str]:
    """Return a warning for each input that has no value, or only one value, in the rows to fit on."""
    names, statistics = data.signature.matrix_names, data.statistics
    return [
        *(
            f"input '{names[n]}' has no value in any row to fit on"
            for n in np.flatnonzero(statistics.is_empty)
        ),
        *(
            f"input '{names[n]}' has the same value in all rows to fit on"
            for n in np.flatnonzero(statistics.is_constant & ~statistics.is_empty)
        ),
    ]


def _leaking_inputs(data: TrainingData) -> list[str]:
    """Return a warning for each input that reveals the label: a copy of the label, or a consequence of it."""
    rows, target, signature = data.statistics.sample, data.statistics.sample_target, data.signature
    warnings = []
    for position, spec in enumerate(signature.matrix_columns):
        leak = _describe_leak(
            rows[:, position], target, signature.task, is_category=spec.categories is not None
        )
        if leak:
            warnings.append(
                f"leak: input '{signature.matrix_names[position]}' {leak} '{signature.label}'. "
                "Exclude it if it is not known before the label"
            )
    return warnings


def _describe_leak(column: Floats, target: Target, task: Task, *, is_category: bool) -> str | None:
    """Return how an input reveals the label, as a phrase to put before the label's name; None if it does not."""
    present = ~np.isnan(column)
    if present.sum() < MIN_ROWS:
        return None
    if not present.all() and _determines(present.astype(np.float32), target):
        return "is missing depending on the value of label"
    column, target = column[present], target[present]
    if _determines(column, target):
        return "determines label"
    if is_category:
        return None
    if task is Task.regression:
        is_close = abs(_rank_correlation(column, target)) >= LEAK_RANK_CORRELATION
        return "ranks the rows in the same order as label" if is_close else None
    if task is Task.multiclass:
        return "alone separates the classes of label" if _separates(column, target) else None
    if min((target == 0).sum(), (target == 1).sum()) >= MIN_OF_CLASS:
        auc = roc_auc(column.astype(np.float64), target)
        if auc is not None and max(auc, 1 - auc) >= LEAK_AUC:
            return f"alone separates the classes (auc {max(auc, 1 - auc):.4f}) of label"
    return None


def _separates(column: Floats, target: Target) -> bool:
    """Return whether each class has its own interval of values, with at least `MIN_OF_CLASS` rows."""
    order = np.argsort(column)
    values, classes = column[order], target[order]
    ends = np.flatnonzero(classes[1:] != classes[:-1])
    present, rows = np.unique(target, return_counts=True)
    has_enough_rows = len(present) > 1 and rows.min() >= MIN_OF_CLASS
    return (
        has_enough_rows and len(ends) == len(present) - 1 and bool((values[ends] != values[ends + 1]).all())
    )


def _determines(column: Floats, target: Target) -> bool:
    """Return whether the column's value determines the target, except in a few rows, and with enough rows per value."""
    _, values = np.unique(column, return_inverse=True)
    _, classes = np.unique(target, return_inverse=True)
    num_values, num_classes = int(values.max()) + 1, int(classes.max()) + 1
    if num_values * MIN_OF_CLASS > len(column) or num_classes * MIN_OF_CLASS > len(column):
        return False
    pairs, counts = np.unique(values * num_classes + classes, return_counts=True)
    most_frequent = np.zeros(num_values, dtype=np.int64)
    np.maximum.at(most_frequent, pairs // num_classes, counts)
    errors_without = len(column) - int(np.bincount(classes).max())
    errors_with = len(column) - int(most_frequent.sum())
    return errors_without >= MIN_OF_CLASS and errors_with <= LEAK_ERRORS * errors_without


def _rank_correlation(column: Floats, target: Target) -> float:
    ranks = [
        np.unique(values.astype(np.float32), return_inverse=True)[1].astype(float)
        for values in (column, target)
    ]
    if any(rank.std() == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
