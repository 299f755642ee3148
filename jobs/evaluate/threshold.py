"""The decision threshold with the lowest stated cost.

The threshold is chosen on the validation rows. The held-out rows then show its cost. If they chose the threshold
themselves, its cost would look lower than it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

EDGE = 1e-6
"""A threshold is between this and 1 minus this."""


class Costs(NamedTuple):
    """Cost of each kind of wrong decision."""

    false_positive: float
    false_negative: float


@dataclass(kw_only=True, slots=True)
class CostConfig:
    """Cost of wrong decisions, in any unit. Without both, no threshold is chosen."""

    false_positive: float | None = None
    """Cost of a row that is decided positive, and is negative."""
    false_negative: float | None = None
    """Cost of a row that is decided negative, and is positive."""

    def __post_init__(self) -> None:
        if (self.false_positive is None) != (self.false_negative is None):
            raise ValueError("Give both costs: cost.false_positive and cost.false_negative.")
        for name in ("false_positive", "false_negative"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ValueError(f"cost.{name} must be a positive number, got {value}.")

    @property
    def is_stated(self) -> bool:
        return self.false_positive is not None

    def stated(self) -> Costs:
        """Return both costs. They must be stated."""
        assert self.false_positive is not None
        assert self.false_negative is not None
        return Costs(self.false_positive, self.false_negative)


def cost_per_row(scores: Floats, target: npt.NDArray[Any], threshold: float, cost: Costs) -> float:
    """Return the mean cost of deciding by a threshold."""
    selected = scores >= threshold
    wrong = cost.false_positive * (selected & (target == 0)) + cost.false_negative * (
        ~selected & (target == 1)
    )
    return float(wrong.mean())


def cheapest_threshold(scores: Floats, target: npt.NDArray[Any], cost: Costs) -> float:
    """Return the threshold with the lowest cost on these rows.

    Thresholds between two neighbouring scores decide alike, so the one in the middle is taken. Of several thresholds
    with the lowest cost, the result is the one in the widest gap, because it depends least on single rows.
    """
    order = np.argsort(scores, kind="stable")
    levels, first = np.unique(scores[order], return_index=True)
    positive = (target[order] == 1).astype(np.int64)
    missed = np.concatenate([[0], np.cumsum(positive)])
    alarms = np.concatenate([[0], np.cumsum(1 - positive)])
    rows_below = np.concatenate([first, [len(scores)]])  # number of rows below each candidate
    costs = cost.false_negative * missed[rows_below] + cost.false_positive * (alarms[-1] - alarms[rows_below])
    lower, upper = np.concatenate([[0.0], levels]), np.concatenate([levels, [1.0]])
    best = np.flatnonzero(costs == costs.min())
    widest = best[np.argmax((upper - lower)[best])]
    return float(np.clip((lower[widest] + upper[widest]) / 2, EDGE, 1 - EDGE))


def choose_threshold(
    validation: tuple[Floats, npt.NDArray[Any]],
    evaluated: tuple[Floats, npt.NDArray[Any]],
    cost: Costs,
    *,
    current: float,
) -> dict[str, Any]:
    """Choose a threshold on the validation rows, and compute its cost on the evaluated rows.

    Args:
        validation: Scores and target of the validation rows.
        evaluated: Scores and target of the evaluated rows.
        cost: The stated costs.
        current: The version's threshold.
    """
    chosen = cheapest_threshold(*validation, cost)
    return {
        "false_positive": cost.false_positive,
        "false_negative": cost.false_negative,
        "validation_rows": len(validation[1]),
        "chosen": chosen,
        "current": current,
        "cost_of_chosen": cost_per_row(*evaluated, chosen, cost),
        "cost_of_current": cost_per_row(*evaluated, current, cost),
        # The best threshold for perfectly calibrated probabilities (Elkan 2001). A large gap to `chosen` shows that the
        # probabilities are not calibrated, or that there are few validation rows.
        "if_calibrated": cost.false_positive / (cost.false_positive + cost.false_negative),
    }
