"""The result of a stage in one line, for the output of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SUMMARY = "summary"
"""A result with a text of this name is shown as this text."""
_SHOWN = (
    "version",
    "champion",
    "rows",
    "rows_in",
    "rows_stored",
    "rows_quarantined",
    "scored",
    "set_aside",
    "auc",
    "accuracy",
    "log_loss",
    "rmse",
    "mae",
    "r2",
)
"""Names that are shown first, in this order, also as the last part of a dotted name."""
_MAX_VALUES = 5


def summarize(result: Mapping[str, Any]) -> str:
    """Return the figures of a flat result in one line; "" if it has none.

    Of a figure that the result has several times, for example for each slice, only the whole one is shown.
    """
    if isinstance(result.get(SUMMARY), str):
        return " ".join(result[SUMMARY].split())
    figures = {
        name: value
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    known: dict[str, Any] = {}
    for short in _SHOWN:
        whole = next((name for name in (short, f"metrics.{short}") if name in figures), None)
        nested = [name for name in figures if name.endswith(f".{short}")]
        if whole is not None or len(nested) == 1:
            known[short] = figures[whole or nested[0]]
    others = {name: value for name, value in figures.items() if "." not in name}
    shown = list((known | others).items())[:_MAX_VALUES]
    return ", ".join(f"{name} {_text(value)}" for name, value in shown)


def _text(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
