"""What the monitoring job says: lines for people, and its output file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.monitor.logged import Served

WORDS = {
    "drift": "drifted",
    "missing": "unusual shares of nulls",
    "unseen": "values that the model does not know",
}


class Output:
    """The content of the output file: everything by variant and version."""

    def __init__(self) -> None:
        self._variants: dict[str, dict[str, Any]] = {}
        self._details: dict[str, dict[str, Any]] = {}

    def add(self, served: Served, figures: dict[str, Any]) -> None:
        """Take up one version's figures."""
        version = str(served.version.version)
        self._variants.setdefault(served.variant, {})[version] = figures["periods"]
        self._details.setdefault(served.variant, {})[version] = figures

    def content(self) -> dict[str, Any]:
        """`variants` has the periods by variant and version, `details` all figures."""
        return {"variants": self._variants, "details": self._details}


def alerted(distances: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Column to the chunks in which it left its threshold."""
    found = {
        name: [chunk for chunk, one in by_chunk.items() if one["alert"]]
        for name, by_chunk in distances.items()
    }
    return {name: chunks for name, chunks in found.items() if chunks}


def describe(name: str, figures: dict[str, Any]) -> list[str]:
    """Lines for people: the performance, then what has changed, what cannot be said, and what is in no figure."""
    metric, undefined = figures["metric"], figures["undefined"]
    if figures["status"] != "measured":
        lines = [f"{name}: {figures['status']}"]
    else:
        shown = [
            f"{chunk} {_shown(one[f'estimated_{metric}'])} / {_shown(one[f'realised_{metric}'])}"
            for chunk, one in figures["periods"].items()
        ]
        lines = [f"{name}: {metric} estimated / realised: {', '.join(shown)}"]
    for figure in ("estimate", "realisation"):
        wrong = [chunk for chunk, one in figures["periods"].items() if one[figure] and one[figure]["alert"]]
        lines += (
            [f"{name}: ALERT {figure} of {metric} beyond its threshold: {', '.join(wrong)}"] if wrong else []
        )
    for kind, words in WORDS.items():
        for column, chunks in alerted(figures[kind]).items():
            shares = [f"{chunk} {figures[kind][column][chunk]['value']:.3f}" for chunk in chunks]
            lines.append(f"{name}: ALERT {column} {words}: {', '.join(shares)}")
    for figure, by_chunk in undefined.items():
        by_reason: dict[str, list[str]] = {}
        for chunk, reason in by_chunk.items():
            by_reason.setdefault(reason, []).append(chunk)
        lines += [f"{name}: {figure} {', '.join(chunks)}: {reason}" for reason, chunks in by_reason.items()]
    counts = [f"{what.replace('_', ' ')} {count}" for what, count in figures["left_out"].items() if count]
    return [*lines, *([f"{name}: in no figure: {', '.join(counts)}"] if counts else [])]


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
