"""Sections about a version's quality. Pure functions of the ledger's entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.ledger.chain import Entry
from cluster.runtime import Task
from jobs.evaluate.fairness import OPPORTUNITY, PARITY
from jobs.metrics import headline_metric
from jobs.model_card import figures
from jobs.model_card.content import SHOWN, Figure, Section, Table, interval, number, short
from jobs.model_card.history import History
from jobs.pipeline.report.formats import ABSENT, integer


def evaluation_sections(history: History) -> Iterator[Section]:
    entry = history.evaluation
    if entry is None:
        metrics = history.trace.registered.payload["metrics"]
        yield Section(
            title="Quality",
            text="Metrics of the training job on its held-out rows. `jobs.evaluate` adds intervals, groups and plots.",
            tables=[_metric_table(metrics, {})],
            figures=_calibration(metrics),
            events=[history.trace.registered],
        )
        return
    yield _quality(history, entry)
    yield _groups(history)
    yield _inputs(history)
    others = [
        [short(other.payload["data_hash"]), integer(other.payload["rows"]), *_main(history, other)]
        for other in history.other_evaluations
    ]
    if others:
        yield Section(
            title="Other evaluations",
            tables=[Table(head=["data", "rows", "metric", "value"], rows=others)],
            events=history.other_evaluations,
        )


def _quality(history: History, entry: Entry) -> Section:
    payload = entry.payload
    intervals = payload.get("intervals") or {}
    threshold, of_threshold = newest_part(history, "threshold")
    required, of_required = newest_part(history, "requirements")
    facts = {
        "evaluated": f"{entry.time[:10]} by {entry.actor}",
        "rows": integer(payload["rows"]),
        "data": short(payload["data_hash"]),
    }
    if intervals:
        columns = ", ".join(intervals["entity_columns"]) or "each row"
        facts["entities"] = f"{integer(intervals['entities'])} ({columns})"
    tables = [_metric_table(payload["metrics"], intervals)]
    if threshold:
        rows = [
            [
                "chosen on the validation rows",
                number(threshold["chosen"]),
                number(threshold["cost_of_chosen"]),
            ],
            ["of the version", number(threshold["current"]), number(threshold["cost_of_current"])],
        ]
        caption = (
            f"Cost of a row if a false positive costs {number(threshold['false_positive'])} and a false negative "
            f"{number(threshold['false_negative'])}"
        )
        tables.append(Table(head=["threshold", "value", "cost"], rows=rows, caption=caption))
    if required:
        rows = [
            [
                name,
                f"{one['rule']} {number(one['bound'])}",
                number(one["value"]),
                "met" if one["met"] else "NOT met",
            ]
            for name, one in required.items()
        ]
        tables.append(Table(head=["requirement", "bound", "value", "verdict"], rows=rows))
    drawings = [*_metric_figure(payload["metrics"], intervals), *_calibration(payload["metrics"])]
    events = _distinct([entry, *of_threshold, *of_required])
    return Section(title="Quality", facts=facts, tables=tables, figures=drawings, events=events)


def newest_part(history: History, name: str) -> tuple[dict[str, Any], list[Entry]]:
    """Return a part of the newest evaluation that has it, and this evaluation. Both are empty if there is none."""
    entry = history.newest_with(name)
    return ({}, []) if entry is None else (entry.payload[name], [entry])


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    return list({entry.seq: entry for entry in entries}.values())


def _metric_table(metrics: dict[str, Any], intervals: dict[str, Any]) -> Table:
    found = intervals.get("metrics", {})
    rows = [
        [name, number(value), interval(found.get(name))]
        for name, value in metrics.items()
        if name != "rows" and (value is None or isinstance(value, int | float))
    ]
    if not found:
        return Table(head=["metric", "value"], rows=[row[:2] for row in rows])
    return Table(head=["metric", "value", f"{intervals['level']:.0%} interval"], rows=rows)


def _metric_figure(metrics: dict[str, Any], intervals: dict[str, Any]) -> list[Figure]:
    found = intervals.get("metrics", {})
    shown = ("auc", "accuracy", "r2", "brier", "ece", "positive_rate", "selection_rate")
    values = {name: (metrics.get(name), found.get(name)) for name in shown if metrics.get(name) is not None}
    if not found or not values:
        return []
    caption = "Metrics between 0 and 1, with their intervals. Rows of one entity were drawn together."
    return [Figure(drawing=figures.intervals(values, label="Metrics with intervals"), caption=caption)]


def _calibration(metrics: dict[str, Any]) -> list[Figure]:
    bins = metrics.get("calibration")
    if not bins:
        return []
    caption = (
        "Reliability: the observed rate in each bin of the predicted probability. A calibrated model is on the "
        f"diagonal. Expected calibration error: {number(metrics.get('ece'))}."
    )
    return [Figure(drawing=figures.reliability(bins), caption=caption)]


def _groups(history: History) -> Section:
    slices, of_slices = newest_part(history, "slices")
    fairness, of_fairness = newest_part(history, "fairness")
    tables, drawings = [], []
    for column, by_value in slices.items():
        names = [name for name in ("auc", "accuracy", "rmse", "positive_rate") if _any_has(by_value, name)]
        rows = [
            [value, integer(one["rows"]), *(number(one.get(name)) for name in names)]
            for value, one in by_value.items()
        ]
        tables.append(Table(head=[column, "rows", *names], rows=rows, caption=f"By {column}"))
        if names:
            values = {value: (one.get(names[0]), None) for value, one in by_value.items()}
            caption = f"{names[0]} by {column}"
            drawings.append(Figure(drawing=figures.intervals(values, label=caption), caption=caption))
    for column, rates in fairness.items():
        rows = [
            [value, integer(one["rows"]), number(one["selection_rate"]), number(one["true_positive_rate"])]
            for value, one in rates["groups"].items()
        ]
        caption = (
            f"Fairness by {column}: demographic parity difference {_with_interval(rates, PARITY)}, equal opportunity "
            f"difference {_with_interval(rates, OPPORTUNITY)}"
        )
        head = [column, "rows", "selection rate", "true positive rate"]
        tables.append(Table(head=head, rows=rows, caption=caption))
        drawings.append(
            Figure(drawing=figures.group_rates(rates["groups"], column), caption=f"Rates by {column}")
        )
    events = _distinct([*of_slices, *of_fairness])
    return Section(title="Groups", tables=tables, figures=drawings, events=events)


def _inputs(history: History) -> Section:
    attributions, of_attributions = newest_part(history, "attributions")
    robustness, of_robustness = newest_part(history, "robustness")
    tables, drawings = [], []
    if attributions:
        largest = dict(sorted(attributions["inputs"].items(), key=lambda item: -item[1])[:SHOWN])
        caption = (
            f"Mean absolute attribution by {attributions['method']}, on {integer(attributions['rows'])} rows. It "
            "describes the model, and does not say what causes the label."
        )
        rows = [[name, number(value)] for name, value in largest.items()]
        tables.append(
            Table(
                head=["input", "attribution"], rows=rows, caption=f"Attributions by {attributions['method']}"
            )
        )
        drawings.append(Figure(drawing=figures.bars(largest, label="Attributions"), caption=caption))
    if robustness:
        caption = (
            f"{robustness['metric']} on a sample of {integer(robustness['rows'])} rows, unchanged: "
            f"{number(robustness['unchanged'])}. A shift moves numbers by one standard deviation and exchanges "
            "categories between rows."
        )
        rows = [
            [name, number(value), number(robustness["shifted"].get(name))]
            for name, value in robustness["missing"].items()
        ]
        rows += [
            [f"{share} of all values", number(v), ABSENT] for share, v in robustness["some_missing"].items()
        ]
        tables.append(
            Table(
                head=["changed input", "missing", "shifted"],
                rows=rows,
                caption=f"{robustness['metric']} with changed inputs",
            )
        )
        drawings.append(Figure(drawing=figures.robustness(robustness, shown=SHOWN), caption=caption))
    events = _distinct([*of_attributions, *of_robustness])
    return Section(title="Inputs", tables=tables, figures=drawings, events=events)


def _main(history: History, entry: Entry) -> list[str]:
    name = headline_metric(Task(history.trace.registered.payload["task"]))
    return [name, number(entry.payload["metrics"].get(name))]


def _any_has(by_value: dict[str, Any], name: str) -> bool:
    return any(one.get(name) is not None for one in by_value.values())


def _with_interval(rates: dict[str, Any], name: str) -> str:
    ends = interval(rates.get(f"{name}_interval"))
    return number(rates[name]) + ("" if ends == ABSENT else f" ({ends})")
