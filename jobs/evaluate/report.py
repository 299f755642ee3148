"""Printed lines of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.ledger.events import ModelEvaluated
from cluster.runtime import ModelSignature
from jobs.evaluate.fairness import OPPORTUNITY, PARITY
from jobs.metrics import headline, headline_metric

SHOWN = 3
"""Number of inputs that a line names."""


def describe(event: ModelEvaluated, signature: ModelSignature) -> Iterator[str]:
    """Yield the result as lines of text. The first line has the main metric."""
    name = headline_metric(signature.task)
    interval = interval_text(event.intervals.get("metrics", {}).get(name))
    yield (
        f"evaluated {event.name} version {event.version} on {event.rows} rows: "
        f"{headline(signature.task, event.metrics)}{interval}"
    )
    if event.intervals:
        columns = event.intervals["entity_columns"]
        unit = f"entities ({', '.join(columns)})" if columns else "rows"
        yield f"intervals: {event.intervals['level']:.0%}, from {event.intervals['entities']} {unit}"
    for column, rates in event.fairness.items():
        yield (
            f"fairness by {column}: demographic parity difference {_difference(rates, PARITY)}, equal opportunity "
            f"difference {_difference(rates, OPPORTUNITY)}"
        )
    if event.threshold:
        yield _threshold_line(event.threshold)
    if event.attributions:
        inputs = list(event.attributions["inputs"])[:SHOWN]
        yield f"largest attributions: {', '.join(inputs)}, by {event.attributions['method']}"
    if event.robustness:
        yield _robustness_line(event.robustness)
    if event.parity:
        yield (
            f"ONNX ({event.parity['precision']}) against the network: scores differ by at most "
            f"{event.parity['largest_score_difference']:.2g}"
        )
    for metric, result in event.requirements.items():
        verdict = "met" if result["met"] else "NOT met"
        yield f"required: {metric} {result['rule']} {result['bound']:.4g}: {verdict}"


def interval_text(interval: list[float] | None) -> str:
    """Return an interval as text with a leading space; empty if there is none."""
    return "" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]"


def _difference(rates: dict[str, Any], name: str) -> str:
    if rates[name] is None:
        return "undefined (fewer than two groups with enough rows)"
    return f"{rates[name]:.3f}{interval_text(rates.get(f'{name}_interval'))}"


def _threshold_line(threshold: dict[str, Any]) -> str:
    return (
        f"threshold {threshold['chosen']:.4f} costs {threshold['cost_of_chosen']:.4g} a row, the version's "
        f"{threshold['current']:.4g} costs {threshold['cost_of_current']:.4g}; chosen on "
        f"{threshold['validation_rows']} validation rows. `jobs.train threshold={threshold['chosen']:.4f}` trains a "
        "version with it"
    )


def _robustness_line(robustness: dict[str, Any]) -> str:
    metric, unchanged = robustness["metric"], robustness["unchanged"]
    changes = [
        (abs(value - unchanged), f"{kind} {name}", value)
        for kind in ("missing", "shifted")
        for name, value in robustness[kind].items()
        if value is not None and unchanged is not None
    ]
    if not changes:
        return f"robustness: {metric} is undefined on a sample of {robustness['rows']} rows"
    _, change, value = max(changes)
    return f"robustness: {metric} {unchanged:.4f} on a sample of {robustness['rows']} rows; with {change} {value:.4f}"
