"""What is wrong with a data set before a model is fitted to it: refused where nothing could be learned or judged,
warned of where a model would look better than it is.

The checks look at the encoded matrix, so they see what the model sees. A leak is looked for in a sample of the rows.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import TrainingSetError
from cluster.runtime import Task
from jobs.metrics import roc_auc
from jobs.train.data import Dataset

Floats = npt.NDArray[np.float32]
Target = npt.NDArray[Any]

SAMPLE = 20_000
"""Rows that a leak is looked for in."""
MIN_ROWS = 20
"""Fewer rows with a value say nothing of a leak."""
MIN_OF_CLASS = 5
"""Rows of the rarer class, and mean rows of a value, below which a perfect fit may be chance."""
LEAK_AUC = 0.999
LEAK_RANK_CORRELATION = 0.9999
LEAK_ERRORS = 0.01
"""Errors that remain when each value of an input is answered with its most frequent class, of those without it."""


def check_rows(dataset: Dataset) -> list[str]:
    """Prove that a model can be fitted and judged; gives what to be wary of, one sentence each.

    Raises:
        TrainingSetError: the label has one value in the rows to fit on, or in those that are held out.
    """
    return [*_check_target(dataset), *_doubled(dataset), *_constant(dataset), *_leaks(dataset)]


def _check_target(dataset: Dataset) -> list[str]:
    label, task = dataset.signature.label, dataset.signature.task
    fit, held_out = dataset.target[dataset.fit], dataset.target[dataset.held_out]
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
            "model cannot be judged. Set another `split.column`; `split.column=null` draws rows by the seed."
        )
    return [
        f"no {what} row has label '{label}' = {', '.join(absent)}"
        for what, rows in (("training", fit), ("held-out", held_out))
        if (absent := _absent(dataset, rows))
    ]


def _absent(dataset: Dataset, rows: Target) -> list[str]:
    present = set(np.unique(rows).tolist())
    return [repr(name) for code, name in enumerate(dataset.signature.classes or ()) if code not in present]


def _doubled(dataset: Dataset) -> list[str]:
    """Inputs that hold the same values in all rows to fit on."""
    same: dict[bytes, list[str]] = defaultdict(list)
    rows = dataset.matrix[dataset.fit]
    for position, name in enumerate(dataset.signature.matrix_names):
        same[np.ascontiguousarray(rows[:, position]).tobytes()].append(name)
    return [
        f"inputs {', '.join(map(repr, names))} hold the same values; one of them is enough"
        for names in same.values()
        if len(names) > 1
    ]


def _constant(dataset: Dataset) -> list[str]:
    rows = dataset.matrix[dataset.fit]
    columns = dataset.signature.matrix_names
    empty = [name for position, name in enumerate(columns) if np.isnan(rows[:, position]).all()]
    constant = [
        name
        for position, name in enumerate(columns)
        if name not in empty and (rows[:, position] == rows[0, position]).all()
    ]
    found = [f"input '{name}' has no value in any row to fit on" for name in empty]
    return found + [f"input '{name}' has the same value in all rows to fit on" for name in constant]


def _leaks(dataset: Dataset) -> list[str]:
    """Inputs that say what the label is: a copy of it, or a consequence."""
    places = np.flatnonzero(dataset.fit)
    if len(places) > SAMPLE:
        places = np.random.default_rng(0).choice(places, SAMPLE, replace=False)
    rows, target, label = dataset.matrix[places], dataset.target[places], dataset.signature.label
    advice = "Exclude it if it is not known before the label is"
    found = []
    names = dataset.signature.matrix_names
    for position, spec in enumerate(dataset.signature.matrix_columns):
        name, column = names[position], rows[:, position]
        known = ~np.isnan(column)
        task = dataset.signature.task
        if known.sum() >= MIN_ROWS and not known.all() and _determines(known.astype(np.float32), target):
            found.append(f"leak: input '{name}' is missing just where label '{label}' says. {advice}")
        elif known.sum() >= MIN_ROWS and (
            said := _leak(column[known], target[known], task, is_category=spec.categories is not None)
        ):
            found.append(f"leak: input '{name}' {said.format(label=label)}. {advice}")
    return found


def _leak(column: Floats, target: Target, task: Task, *, is_category: bool) -> str | None:
    if _determines(column, target):
        return "says what label '{label}' is, as a copy of it would"
    if is_category:
        return None
    if task is Task.regression:
        close = abs(_rank_correlation(column, target)) >= LEAK_RANK_CORRELATION
        return "ranks the rows as label '{label}' does" if close else None
    if task is Task.multiclass:
        return "alone puts the rows in order of label '{label}'" if _separates(column, target) else None
    if min((target == 0).sum(), (target == 1).sum()) >= MIN_OF_CLASS:
        auc = roc_auc(column.astype(np.float64), target)
        if auc is not None and max(auc, 1 - auc) >= LEAK_AUC:
            return f"alone ranks the rows as label '{{label}}' does (auc {max(auc, 1 - auc):.4f})"
    return None


def _separates(column: Floats, target: Target) -> bool:
    """Whether each class has an interval of values to itself."""
    order = np.argsort(column)
    values, classes = column[order], target[order]
    ends = np.flatnonzero(classes[1:] != classes[:-1])
    known, rows = np.unique(target, return_counts=True)
    enough = len(known) > 1 and rows.min() >= MIN_OF_CLASS
    return enough and len(ends) == len(known) - 1 and bool((values[ends] != values[ends + 1]).all())


def _determines(column: Floats, target: Target) -> bool:
    """Whether each value goes with one value of the target, but for a few rows, and not by chance."""
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
        np.unique(one.astype(np.float32), return_inverse=True)[1].astype(float) for one in (column, target)
    ]
    if any(one.std() == 0 for one in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
