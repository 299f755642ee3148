"""Requirements of a version: `require.auc=0.8` ends the command with exit code 2 if the AUC is below 0.8."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cluster.errors import RefusedError

_AT_LEAST = frozenset({"auc", "accuracy", "r2"})
"""For these metrics, a bound is the smallest value that is allowed. For all others it is the largest."""


@dataclass(kw_only=True, slots=True)
class RequireConfig:
    """Bounds of metrics. None requires nothing."""

    auc: float | None = None
    """Smallest AUC."""
    accuracy: float | None = None
    """Smallest accuracy."""
    r2: float | None = None
    """Smallest r2."""
    log_loss: float | None = None
    """Largest log loss."""
    brier: float | None = None
    """Largest Brier score."""
    ece: float | None = None
    """Largest expected calibration error."""
    rmse: float | None = None
    """Largest root mean squared error."""
    mae: float | None = None
    """Largest mean absolute error."""
    bias: float | None = None
    """Largest absolute mean error."""
    demographic_parity_difference: float | None = None
    """Largest difference between the groups of any column of `fairness`."""
    equal_opportunity_difference: float | None = None
    """Largest difference between the groups of any column of `fairness`."""
    cost: float | None = None
    """Largest cost of a row, with the threshold that was chosen by `cost`."""


def check_requirements(config: RequireConfig, values: dict[str, float | None]) -> dict[str, Any]:
    """Return each required metric with its bound, its value and whether it meets the bound.

    Args:
        config: The bounds.
        values: Metrics of the evaluated rows. A required metric that is missing or None does not meet its bound.
    """
    results: dict[str, Any] = {}
    for name, bound in asdict(config).items():
        if bound is None:
            continue
        value = values.get(name)
        is_least = name in _AT_LEAST
        met = value is not None and (value >= bound if is_least else abs(value) <= bound)
        results[name] = {
            "bound": bound,
            "rule": "at least" if is_least else "at most",
            "value": value,
            "met": met,
        }
    return results


def require_met(results: dict[str, Any], *, model: str) -> None:
    """Require that all requirements are met.

    Args:
        results: What `check_requirements` returned.
        model: Name and version of the model, for the error message.

    Raises:
        RefusedError: Some are not. The message names all of them.
    """
    failed = [
        f"{name} is {'undefined' if one['value'] is None else format(one['value'], '.4g')}, "
        f"required is {one['rule']} {one['bound']:.4g}"
        for name, one in results.items()
        if not one["met"]
    ]
    if failed:
        raise RefusedError(
            f"{model} does not meet its requirements: {'; '.join(failed)}. The result is in the ledger. Train a better "
            "version, or change `require.…`."
        )
