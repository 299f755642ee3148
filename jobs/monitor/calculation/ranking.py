"""Rank inputs by their alerts, so that a reader looks at the worst input first.

The order is that of NannyML's `AlertCountRanker`: the number of alerts. Inputs with as many alerts are ordered by how
far their worst value is beyond its threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = ("drift", "missing", "unseen")
"""Figures of single inputs."""


def rank_alerts(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the columns with an alert, the worst first.

    Each has `column`, `alerts` (number over all kinds and chunks), `kinds`, `chunks`, and `worst`: how many times its
    threshold its worst value is.

    Args:
        figures: For each kind of `KINDS`, the measures by column and chunk.
    """
    ranked: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        for column, by_chunk in figures.get(kind, {}).items():
            for chunk, measure in by_chunk.items():
                if not measure["alert"]:
                    continue
                row = ranked.setdefault(
                    column, {"column": column, "alerts": 0, "kinds": [], "chunks": [], "worst": 0.0}
                )
                row["alerts"] += 1
                row["kinds"] += [kind] if kind not in row["kinds"] else []
                row["chunks"] += [chunk] if chunk not in row["chunks"] else []
                row["worst"] = max(row["worst"], _times_threshold(measure))
    for row in ranked.values():
        row["chunks"].sort()
    return sorted(ranked.values(), key=lambda row: (-row["alerts"], -row["worst"], row["column"]))


def _times_threshold(measure: Mapping[str, Any]) -> float:
    """Return a value in units of the threshold that it exceeds. Below a lower threshold, the ratio is inverted."""
    value, upper, lower = (
        float(measure[name] or 0) for name in ("value", "upper_threshold", "lower_threshold")
    )
    if upper and value > upper:
        return value / upper
    return lower / value if lower and value else 1.0
