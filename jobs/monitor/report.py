"""Output of the monitoring job: printed lines, and the content of its output file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.monitor.logged import ServedVersion

ALERT_TEXTS = {
    "drift": "drifted",
    "missing": "has an unusual share of nulls",
    "unseen": "has values that the model does not know",
}

TRAFFIC_TEXTS = {
    "requests": "unusual number of requests in an hour",
    "refused": "unusual share of requests without an answer in an hour",
    "unseen": "unusual share of entities without any feature in an hour",
}


RANKED = 5
"""Number of columns that the printed ranking has."""


class Output:
    """Content of the output file: all figures by variant and version."""

    def __init__(self) -> None:
        self._variants: dict[str, dict[str, Any]] = {}
        self._details: dict[str, dict[str, Any]] = {}

    def add(self, served: ServedVersion, figures: dict[str, Any]) -> None:
        """Add the figures of one version."""
        version = str(served.version.version)
        self._variants.setdefault(served.variant, {})[version] = figures["periods"]
        self._details.setdefault(served.variant, {})[version] = figures

    def content(self) -> dict[str, Any]:
        """Return the JSON content: `variants` with the periods by variant and version, `details` with all figures."""
        return {"variants": self._variants, "details": self._details}


def alerting_chunks(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """For each column with an alert, return the chunks in which its value is beyond its threshold."""
    alerts = {
        column: [chunk for chunk, measure in by_chunk.items() if measure["alert"]]
        for column, by_chunk in figures.items()
    }
    return {column: chunks for column, chunks in alerts.items() if chunks}


def describe(name: str, figures: dict[str, Any]) -> list[str]:
    """Describe a version's figures in lines of text.

    The order is: performance, alerts, undefined figures with the reason, and numbers of rows and outcomes that no
    figure includes.
    """
    return [
        f"{name}: {line}"
        for line in (
            _performance_line(figures),
            *_performance_alerts(figures),
            *_column_alerts(figures),
            *_reconstruction_alerts(figures),
            *_ranking_line(figures.get("ranking", [])),
            *_undefined_lines(figures["undefined"]),
            *_excluded_lines(figures["left_out"]),
        )
    ]


def describe_traffic(traffic: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Describe the hours with unusual traffic in lines of text, one for each kind."""
    lines = []
    for kind, hours in alerting_chunks(traffic).items():
        values = [
            f"{hour} {traffic[kind][hour]['value']:.{0 if kind == 'requests' else 3}f}" for hour in hours
        ]
        lines.append(f"ALERT {TRAFFIC_TEXTS[kind]}: {', '.join(values)}")
    return lines


def _performance_line(figures: dict[str, Any]) -> str:
    if figures["status"] != "measured":
        return str(figures["status"])
    metric = figures["metric"]
    values = [
        f"{chunk} {_value_text(period[f'estimated_{metric}'])} / {_value_text(period[f'realised_{metric}'])}"
        for chunk, period in figures["periods"].items()
    ]
    return f"{metric} estimated / realised: {', '.join(values)}"


def _performance_alerts(figures: dict[str, Any]) -> list[str]:
    lines = []
    for figure in ("estimate", "realisation"):
        chunks = [
            chunk
            for chunk, period in figures["periods"].items()
            if period[figure] and period[figure]["alert"]
        ]
        if chunks:
            lines.append(f"ALERT {figure} of {figures['metric']} beyond its threshold: {', '.join(chunks)}")
    return lines


def _column_alerts(figures: dict[str, Any]) -> list[str]:
    lines = []
    for kind, text in ALERT_TEXTS.items():
        for column, chunks in alerting_chunks(figures[kind]).items():
            values = [f"{chunk} {figures[kind][column][chunk]['value']:.3f}" for chunk in chunks]
            lines.append(f"ALERT {column} {text}: {', '.join(values)}")
    return lines


def _reconstruction_alerts(figures: dict[str, Any]) -> list[str]:
    alerts = {chunk: one for chunk, one in figures["reconstruction"].items() if one["alert"]}
    values = [f"{chunk} {one['value']:.3f}" for chunk, one in alerts.items()]
    return [f"ALERT all inputs together drifted: {', '.join(values)}"] if values else []


def _ranking_line(ranking: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns with most alerts, if several have alerts."""
    texts = [f"{row['column']} {row['alerts']}" for row in ranking[:RANKED]]
    return [f"most alerts: {', '.join(texts)}"] if len(texts) > 1 else []


def _undefined_lines(undefined: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return one line for each figure and each reason why it has no value or no threshold, with the chunks."""
    lines = []
    for figure, by_chunk in undefined.items():
        chunks_by_reason: dict[str, list[str]] = {}
        for chunk, reason in by_chunk.items():
            chunks_by_reason.setdefault(reason, []).append(chunk)
        lines += [f"{figure} {', '.join(chunks)}: {reason}" for reason, chunks in chunks_by_reason.items()]
    return lines


def _excluded_lines(left_out: Mapping[str, int]) -> list[str]:
    counts = [f"{name.replace('_', ' ')} {count}" for name, count in left_out.items() if count]
    return [f"in no figure: {', '.join(counts)}"] if counts else []


def _value_text(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
