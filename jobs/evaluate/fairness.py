"""Differences between groups of rows: demographic parity and equal opportunity.

Demographic parity difference: the largest minus the smallest share of rows with a positive prediction. Equal
opportunity difference: the same for the rows whose true class is positive (Hardt, Price & Srebro 2016, arXiv
1610.02413). Both are 0 if all groups are treated the same. Which difference matters is for the user to decide.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.evaluate.bootstrap import Floats, Interval, Statistic, first_of_each, group_sums

PARITY, OPPORTUNITY = "demographic_parity_difference", "equal_opportunity_difference"
SEPARATOR = "\x1f"
"""Between column and difference in the names of bootstrap statistics."""


def group_rates(
    selected: npt.NDArray[np.bool_],
    positive: npt.NDArray[np.bool_],
    values: npt.NDArray[np.str_],
    *,
    min_rows: int,
) -> dict[str, Any]:
    """Return the rates of each group, and the differences between the groups.

    Args:
        selected: For each row, whether the prediction is the positive class.
        positive: For each row, whether the true class is the positive class.
        values: For each row, the value of the column that defines the groups.
        min_rows: A group with fewer rows is not judged: it takes no part in the differences. A group with fewer rows of
            the positive class takes no part in the equal opportunity difference.
    """
    groups: dict[str, Any] = {}
    for value in np.unique(values):
        inside = values == value
        rows, positives = int(inside.sum()), int((inside & positive).sum())
        groups[str(value)] = {
            "rows": rows,
            "positive_rows": positives,
            "judged": rows >= min_rows,
            "selection_rate": float(selected[inside].mean()),
            "true_positive_rate": float(selected[inside & positive].mean())
            if positives >= min_rows
            else None,
        }
    judged = [group for group in groups.values() if group["judged"]]
    return {
        "groups": groups,
        PARITY: _spread([group["selection_rate"] for group in judged]),
        OPPORTUNITY: _spread([group["true_positive_rate"] for group in judged]),
    }


def difference_statistic(
    column: str,
    rates: dict[str, Any],
    selected: npt.NDArray[np.bool_],
    positive: npt.NDArray[np.bool_],
    values: npt.NDArray[np.str_],
) -> Statistic:
    """Return the function that computes both differences of a column from weights.

    Args:
        column: Name of the column.
        rates: What `group_rates` returned for these rows.
        selected, positive, values: See `group_rates`.
    """
    names = [name for name, group in rates["groups"].items() if group["judged"]]
    with_positives = [rates["groups"][name]["true_positive_rate"] is not None for name in names]
    codes = {name: code for code, name in enumerate(names)}
    rows = np.flatnonzero(np.isin(values, names))
    rows = rows[np.argsort([codes[value] for value in values[rows]], kind="stable")]
    starts = first_of_each(values[rows])

    def compute(weights: Floats) -> dict[str, Floats]:
        undefined = np.full(len(weights), np.nan)
        parity = opportunity = undefined
        if len(names) > 1:
            parity = _rate_spread(weights[:, rows], selected[rows], starts)
        if sum(with_positives) > 1:
            of_positives = weights[:, rows] * positive[rows]
            opportunity = _rate_spread(of_positives, selected[rows], starts, only=with_positives)
        return {f"{column}{SEPARATOR}{PARITY}": parity, f"{column}{SEPARATOR}{OPPORTUNITY}": opportunity}

    return compute


def with_intervals(fairness: dict[str, Any], intervals: dict[str, Interval | None]) -> dict[str, Any]:
    """Return the fairness of each column with the intervals of its differences."""
    return {
        column: rates
        | {f"{name}_interval": intervals.get(f"{column}{SEPARATOR}{name}") for name in (PARITY, OPPORTUNITY)}
        for column, rates in fairness.items()
    }


def _rate_spread(
    weights: Floats,
    selected: npt.NDArray[np.bool_],
    starts: npt.NDArray[np.int64],
    *,
    only: list[bool] | None = None,
) -> Floats:
    with np.errstate(invalid="ignore"):  # a group without rows in a replicate: NaN
        rates = group_sums(weights * selected, starts) / group_sums(weights, starts)
    chosen = rates if only is None else rates[:, only]
    return np.asarray(chosen.max(axis=1) - chosen.min(axis=1))


def _spread(rates: list[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return max(known) - min(known) if len(known) > 1 else None
