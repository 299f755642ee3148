"""The content of a card: sections of facts, tables and figures. Pure functions of the ledger's entries.

Both pages, Markdown and HTML, show the same sections. Only HTML shows the figures; a table has the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from cluster.ledger.chain import Entry
from jobs.evaluate.fairness import OPPORTUNITY, PARITY
from jobs.metrics import headline_metric
from jobs.model_card import figures
from jobs.model_card.history import History
from jobs.pipeline.report.formats import ABSENT, integer

SHOWN = 30
"""A table or figure has at most this many inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A drawing with its caption."""

    drawing: Markup
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One part of a card."""

    title: str
    text: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    events: Sequence[Entry] = ()
    """The ledger's entries that the section is made from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A model card."""

    title: str
    lead: str
    sections: Sequence[Section]


def card(history: History) -> Card:
    """Return the card of a version."""
    registered = history.trace.registered.payload
    sections = [
        _details(history),
        _training(history),
        *_evaluation(history),
        *_monitoring(history),
        *_reproduction(history),
        _caveats(history),
        _evidence(history),
    ]
    return Card(
        title=f"{registered['name']} version {registered['version']}",
        lead=_lead(history),
        sections=[one for one in sections if one.text or one.facts or one.tables or one.figures],
    )


def number(value: float | None) -> str:
    """Format a metric with four significant digits."""
    return ABSENT if value is None else f"{value:.4g}"


def _lead(history: History) -> str:
    payload = history.trace.registered.payload
    if history.retired is not None:
        return f"Retired on {history.retired.time[:10]}: {history.retired.payload['reason']}."
    deployed = len(history.trace.deployments) > len(history.trace.removals)
    return f"A {payload['task']} model of the family {payload['family']}. " + (
        "It is deployed." if deployed else "It is not deployed."
    )


def _details(history: History) -> Section:
    entry = history.trace.registered
    payload, config = entry.payload, entry.payload["lineage"].get("config", {})
    parameters = config.get("parameters") or {}
    facts = {
        "registered": f"{entry.time[:19].replace('T', ' ')} UTC by {entry.actor}",
        "task": str(payload["task"]),
        "family": str(payload["family"]),
        "predicts": str(config.get("label", ABSENT)),
    }
    if payload.get("origin"):
        origin = payload["origin"]
        facts["imported from"] = f"{origin['installation']}, version {origin['version']} there"
    rows = [[name, _text(value)] for name, value in sorted(parameters.items())]
    table = [Table(head=["parameter", "value"], rows=rows)] if rows else []
    return Section(title="Model", facts=facts, tables=table, events=[entry])


def _training(history: History) -> Section:
    trace = history.trace
    lineage = trace.registered.payload["lineage"]
    config, built = lineage.get("config", {}), trace.training_set
    split = config.get("split") or {}
    facts = {
        "hash of the rows": _short(lineage.get("training_set_hash")),
        "rows": integer(built.payload["rows"]) if built else ABSENT,
        "feature service": _service(lineage),
        "held out": f"{split['column'] or 'drawn by the seed'}, one in {split['modulo']}"
        if split
        else ABSENT,
        "seed": str(lineage.get("seed", ABSENT)),
        "code": str(lineage.get("git_commit", ABSENT)),
    }
    tables = []
    if lineage.get("table_versions"):
        rows = [[view, str(version)] for view, version in sorted(lineage["table_versions"].items())]
        tables.append(Table(head=["feature view", "table version"], rows=rows))
    if trace.columns:
        rows = [[one.column, one.source, ", ".join(one.source_columns)] for one in trace.columns[:SHOWN]]
        tables.append(Table(head=["input", "source", "columns there"], rows=rows))
    libraries = sorted(lineage.get("libraries", {}).items())
    if libraries:
        tables.append(
            Table(head=["library", "version"], rows=[[name, version] for name, version in libraries])
        )
    events = [trace.registered, *([built] if built else [])]
    return Section(title="Training data and code", facts=facts, tables=tables, events=events)


def _evaluation(history: History) -> Iterator[Section]:
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
    yield _quality(history.trace.registered.payload["task"], entry)
    yield from _groups(entry)
    yield from _inputs(entry)
    others = [
        [_short(other.payload["data_hash"]), integer(other.payload["rows"]), *_main(history, other)]
        for other in history.other_evaluations
    ]
    if others:
        yield Section(
            title="Other evaluations",
            tables=[Table(head=["data", "rows", "metric", "value"], rows=others)],
            events=history.other_evaluations,
        )


def _quality(task: str, entry: Entry) -> Section:
    payload = entry.payload
    intervals, threshold = payload.get("intervals") or {}, payload.get("threshold") or {}
    facts = {
        "evaluated": f"{entry.time[:10]} by {entry.actor}",
        "rows": integer(payload["rows"]),
        "data": _short(payload["data_hash"]),
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
    if payload.get("requirements"):
        rows = [
            [
                name,
                f"{one['rule']} {number(one['bound'])}",
                number(one["value"]),
                "met" if one["met"] else "NOT met",
            ]
            for name, one in payload["requirements"].items()
        ]
        tables.append(Table(head=["requirement", "bound", "value", "verdict"], rows=rows))
    drawings = [*_metric_figure(payload["metrics"], intervals), *_calibration(payload["metrics"])]
    return Section(title="Quality", facts=facts, tables=tables, figures=drawings, events=[entry])


def _metric_table(metrics: dict[str, Any], intervals: dict[str, Any]) -> Table:
    found = intervals.get("metrics", {})
    rows = [
        [name, number(value), _interval(found.get(name))]
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


def _groups(entry: Entry) -> Iterator[Section]:
    slices, fairness = entry.payload["slices"], entry.payload.get("fairness") or {}
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
        tables.append(Table(head=head, rows=rows, caption=f"Rates by {column}"))
        drawings.append(Figure(drawing=figures.group_rates(rates["groups"], column), caption=caption))
    yield Section(title="Groups", tables=tables, figures=drawings, events=[entry])


def _inputs(entry: Entry) -> Iterator[Section]:
    attributions, robustness = entry.payload.get("attributions") or {}, entry.payload.get("robustness") or {}
    tables, drawings = [], []
    if attributions:
        largest = dict(list(attributions["inputs"].items())[:SHOWN])
        caption = (
            f"Mean absolute attribution by {attributions['method']}, on {integer(attributions['rows'])} rows. It "
            "describes the model, and does not say what causes the label."
        )
        rows = [[name, number(value)] for name, value in largest.items()]
        tables.append(Table(head=["input", "attribution"], rows=rows, caption="Attributions"))
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
    yield Section(title="Inputs", tables=tables, figures=drawings, events=[entry])


def _monitoring(history: History) -> Iterator[Section]:
    for entry in history.monitored:
        rows = []
        for period, one in entry.payload["periods"].items():
            estimate = next((v for k, v in one.items() if k.startswith("estimated_")), None)
            realised = next((v for k, v in one.items() if k.startswith("realised_")), None)
            rows.append([period, integer(one["rows"]), number(estimate), number(realised)])
        drifted = sorted(entry.payload["drift"])
        yield Section(
            title=f"Monitoring as {entry.payload['variant']}",
            facts={"monitored": entry.time[:10], "drifted": ", ".join(drifted) or "nothing"},
            tables=[Table(head=["period", "rows", "estimated", "realised"], rows=rows)],
            events=[entry],
        )


def _reproduction(history: History) -> Iterator[Section]:
    entry = history.reproduced
    if entry is None:
        return
    payload = entry.payload
    same = all(payload["same_files"].values())
    facts = {
        "trained again": entry.time[:10],
        "files": "the same, byte for byte" if same else "different",
        "metrics": "the same" if not payload["metrics"] else ", ".join(payload["metrics"]) + " differ",
        "libraries": "the same" if not payload["libraries"] else ", ".join(payload["libraries"]) + " differ",
    }
    yield Section(title="Reproduction", facts=facts, events=[entry])


def _caveats(history: History) -> Section:
    payload = history.trace.registered.payload
    warnings = [*payload.get("warnings", [])]
    evaluation = history.evaluation.payload if history.evaluation else {}
    if not evaluation.get("intervals"):
        warnings.append("the metrics have no intervals: run `jobs.evaluate`")
    if not evaluation.get("fairness") and payload["task"] == "binary":
        warnings.append("differences between groups were not measured: `jobs.evaluate fairness=[…]`")
    parity = evaluation.get("parity")
    if parity:
        warnings.append(
            f"the {parity['precision']} graph's scores differ from the network's by at most "
            f"{number(parity['largest_score_difference'])}"
        )
    rows = [[warning] for warning in warnings]
    return Section(title="Caveats", tables=[Table(head=["warning"], rows=rows)] if rows else [])


def _evidence(history: History) -> Section:
    payload = history.trace.registered.payload
    contents = payload.get("contents") or {}
    tables = []
    if contents:
        rows = [[name, digest] for name, digest in sorted(contents.items())]
        tables.append(Table(head=["file", "SHA-256 before encryption"], rows=rows))
    trace = history.trace
    entries = [trace.registered, trace.training_set, history.evaluation, *history.other_evaluations]
    entries += [*trace.deployments, *trace.removals, *history.monitored, history.reproduced, history.retired]
    by_seq = {entry.seq: entry for entry in entries if entry is not None}
    rows = [[str(seq), by_seq[seq].type, by_seq[seq].time[:19], by_seq[seq].hash] for seq in sorted(by_seq)]
    tables.append(Table(head=["event", "type", "time", "hash"], rows=rows))
    text = "Everything above is in these events. `python -m cluster.ledger verify` checks the chain that they are in."
    return Section(title="Evidence", text=text, tables=tables)


def _main(history: History, entry: Entry) -> list[str]:
    from cluster.runtime import Task

    name = headline_metric(Task(history.trace.registered.payload["task"]))
    return [name, number(entry.payload["metrics"].get(name))]


def _any_has(by_value: dict[str, Any], name: str) -> bool:
    return any(one.get(name) is not None for one in by_value.values())


def _with_interval(rates: dict[str, Any], name: str) -> str:
    interval = _interval(rates.get(f"{name}_interval"))
    return number(rates[name]) + ("" if interval == ABSENT else f" ({interval})")


def _interval(ends: list[float] | None) -> str:
    return ABSENT if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def _service(lineage: dict[str, Any]) -> str:
    return (
        f"{lineage['service']} {_short(lineage.get('service_version'))}" if lineage.get("service") else ABSENT
    )


def _short(digest: str | None) -> str:
    return digest[:16] if digest else ABSENT


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
