"""The sections of a card. Pure functions of the ledger's entries.

Both pages, Markdown and HTML, show the same sections. Only HTML shows the figures; a table has the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs.model_card.content import SHOWN, Card, Section, Table, number, short
from jobs.model_card.evaluation import evaluation_sections, newest_part
from jobs.model_card.history import History
from jobs.pipeline.report.formats import ABSENT, integer


def card(history: History) -> Card:
    """Return the card of a version."""
    registered = history.trace.registered.payload
    sections = [
        _details(history),
        _training(history),
        *evaluation_sections(history),
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
    facts = {
        "hash of the rows": short(lineage.get("training_set_hash")),
        "rows": integer(built.payload["rows"]) if built else ABSENT,
        "feature service": _service(lineage),
        "held out": _held_out(config.get("split") or {}),
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


def _monitoring(history: History) -> Iterator[Section]:
    for entry in history.monitored:
        rows = []
        for period, one in entry.payload["periods"].items():
            estimate = next((v for k, v in one.items() if k.startswith("estimated_")), None)
            realised = next((v for k, v in one.items() if k.startswith("realised_")), None)
            rows.append([period, integer(one["rows"]), number(estimate), number(realised)])
        together = ["all inputs together"] if entry.payload.get("reconstruction") else []
        drifted = [*sorted(entry.payload["drift"]), *together]
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
    if history.newest_with("intervals") is None:
        warnings.append("the metrics have no intervals: run `jobs.evaluate`")
    if history.newest_with("fairness") is None and payload["task"] == "binary":
        warnings.append("differences between groups were not measured: `jobs.evaluate fairness=[…]`")
    parity, _ = newest_part(history, "parity")
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
    entries = [trace.registered, trace.training_set, *history.same_rows, *history.other_evaluations]
    entries += [*trace.deployments, *trace.removals, *history.monitored, history.reproduced, history.retired]
    by_seq = {entry.seq: entry for entry in entries if entry is not None}
    rows = [[str(seq), by_seq[seq].type, by_seq[seq].time[:19], by_seq[seq].hash] for seq in sorted(by_seq)]
    tables.append(Table(head=["event", "type", "time", "hash"], rows=rows))
    text = "Everything above is in these events. `python -m cluster.ledger verify` checks the chain that they are in."
    return Section(title="Evidence", text=text, tables=tables)


def _held_out(split: dict[str, Any]) -> str:
    if split.get("from_time"):
        return f"from {split['from_time']} on"
    return f"{split['column'] or 'drawn by the seed'}, one in {split['modulo']}" if split else ABSENT


def _service(lineage: dict[str, Any]) -> str:
    return (
        f"{lineage['service']} {short(lineage.get('service_version'))}" if lineage.get("service") else ABSENT
    )


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
