"""Render the report of a run: one HTML page. That of the demo explains the loop to readers without prior knowledge.

`render` is a pure function from a run's figures to HTML. Sections without figures are left out. Style and charts are
inside the page, so the page is one file that can be mailed, printed and stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jobs.pipeline.report import figures, formats
from jobs.pipeline.report.diagram import loop_diagram

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRun:
    """One finished stage."""

    name: str
    title: str
    seconds: float
    commands: Sequence[str] = ()
    """Complete command lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """Everything that the page shows. Only `summary` is required. The page leaves out what is not given."""

    summary: Json
    """Content of `summary.json`. `requests` may have p50_ms and p99_ms. `orphans` counts logged predictions
    whose answer did not reach the client."""
    stages: Sequence[StageRun] = ()
    """Stages in the order in which they ran."""
    evaluations: Mapping[str, Json] = field(default_factory=dict)
    """Output of `jobs.evaluate` by variant: `metrics` (with `ece`, `brier`, `calibration`) and `slices`."""
    monitor: Json = field(default_factory=dict)
    """Output of `jobs.monitor` with one version per variant: `variants` and `details`."""
    quarantine: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Number of quarantined rows by feature view and reason."""
    check: Json = field(default_factory=dict)
    """Output of `serve_apps.rollout action=check` for the broken version."""
    split_requests: int | None = None
    """Number of requests that the shares are computed from. None means all sent requests."""
    urls: Mapping[str, str] = field(default_factory=dict)
    """Addresses of the running cluster, by name."""
    finished_at: str = ""
    """Time of the run, as text."""
    pipeline: str | None = None
    """Name of the pipeline. None is the demo, whose page explains the loop."""
    run: str = ""
    """Id and state of the run."""
    reason: str = ""
    """Why the run is not done."""
    graph: Markup = field(default_factory=Markup)
    """Drawing of the stages."""


def render(report: DemoReport) -> str:
    """Render the page as HTML."""
    folder = resources.files("jobs.pipeline.report")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= formats.FILTERS
    template = environment.from_string((folder / "page.html").read_text())
    style = Markup((folder / "page.css").read_text())  # noqa: S704 - our own file
    return template.render(style=style, **_template_values(report))


def _template_values(report: DemoReport) -> dict[str, Any]:
    summary = report.summary
    variants = summary.get("variants", {})
    candidates = [name for name in variants if name != "broken"]
    monitored = summary.get("monitor", {})
    shares, num_requests = summary.get("shares", {}), _split_requests(report)
    return {
        "pipeline": report.pipeline,
        "run": report.run,
        "reason": report.reason,
        "graph": report.graph,
        "finished_at": report.finished_at,
        "headlines": _headlines(summary),
        "diagram": _diagram(summary),
        "rows": summary.get("rows", {}),
        "quarantine": figures.quarantine_rows(report.quarantine),
        "training_set": summary.get("training_set"),
        "variants": {
            name: variants[name] | _evaluation_metrics(report.evaluations.get(name, {})) for name in variants
        },
        "candidates": candidates,
        "calibration": figures.calibration_chart(report.evaluations, candidates),
        "slices": figures.slice_charts(report.evaluations, candidates),
        "requests": summary.get("requests"),
        "log_rows": summary.get("prediction_log_rows"),
        "orphans": summary.get("orphans"),
        "shares": figures.share_rows(shares, num_requests),
        "share_chart": figures.share_chart(shares, num_requests),
        "monitored": monitored,
        "performance": figures.performance_chart(monitored, report.monitor),
        "drift": figures.drift_rows(report.monitor),
        "ranked": figures.ranked_inputs(report.monitor),
        "joint_drift": figures.joint_drift(report.monitor),
        "unusual_hours": figures.unusual_hours(report.monitor),
        "broken": variants.get("broken"),
        "check": report.check,
        "rollback_ms": summary.get("rollback_ms"),
        "ledger": summary.get("ledger"),
        "stages": _stages(report),
        "urls": report.urls,
    }


class Headline(NamedTuple):
    """A figure at the top of the page."""

    figure: str
    name: str
    note: str


def _headlines(summary: Json) -> list[Headline]:
    headlines = []
    champion = summary.get("variants", {}).get("champion")
    if champion:
        auc = formats.score(champion["auc"])
        headlines.append(Headline(auc, "AUC of the champion", "on people held out of training"))
    requests = summary.get("requests")
    if requests:
        errors = formats.count(requests["errors"], "error")
        answered = formats.integer(requests["sent"] - requests["errors"])
        note = f"of {formats.integer(requests['sent'])} sent, {errors}"
        headlines.append(Headline(answered, "requests answered", note))
    if summary.get("rollback_ms") is not None:
        duration = formats.milliseconds(summary["rollback_ms"])
        headlines.append(Headline(duration, "to roll back", "a version broken on purpose"))
    ledger = summary.get("ledger")
    if ledger:
        verdict = "hash chain verified" if ledger["verified"] else "hash chain BROKEN"
        headlines.append(Headline(formats.integer(ledger["events"]), "events in the ledger", verdict))
    return headlines


def _diagram(summary: Json) -> Markup:
    rows, variants = summary.get("rows", {}), summary.get("variants", {})
    total = {
        name: sum(view[name] for view in rows.values()) for name in ("ingested", "stored", "quarantined")
    }
    training_set, requests = summary.get("training_set"), summary.get("requests")
    shares, ledger = summary.get("shares", {}), summary.get("ledger")
    log_rows, rollback_ms = summary.get("prediction_log_rows"), summary.get("rollback_ms")
    boxes = {
        "source": f"{len(rows)} views" if rows else "",
        "features": f"{formats.integer(total['stored'])} rows stored" if rows else "",
        "quarantine": f"{formats.integer(total['quarantined'])} rows, with reasons" if rows else "",
        "training_set": f"{formats.integer(training_set['rows'])} rows" if training_set else "",
        "models": f"{len(variants)} registered" if variants else "",
        "online": "read by key",
        "clients": "one person per request",
        "edge": "TLS, identity, sticky split",
        "variants": "\n".join(
            f"{name}: version {variants[name]['version']}" for name in shares if name in variants
        ),
        "log": "" if log_rows is None else f"{formats.integer(log_rows)} answers\nand their outcomes",
        "monitor": "estimated and realised\nperformance, drift",
        "rollout": "" if rollback_ms is None else f"rolled back in {formats.milliseconds(rollback_ms)}",
        "ledger": f"{formats.integer(ledger['events'])} events" if ledger else "",
    }
    arrows = {
        "ingest": f"{formats.integer(total['ingested'])} rows" if rows else "ingest",
        "join": "join",
        "train": "train",
        "refuse": "bad rows",
        "materialize": "materialise",
        "read": "features by person",
        "deploy": "deploy",
        "request": (
            f"{formats.integer(requests['sent'])} requests, {formats.count(requests['errors'], 'error')}"
            if requests
            else ""
        ),
        "split": " / ".join(f"{share['weight'] * 100:.0f}" for share in shares.values()),
        "answer": "every answer",
        "observe": "observe",
        "verdict": "verdict",
        "weight": "weights",
    }
    return loop_diagram(boxes, arrows, label=_diagram_label(boxes, arrows))


def _diagram_label(boxes: Mapping[str, str], arrows: Mapping[str, str]) -> str:
    return (
        f"The loop: census files ({arrows['ingest']}) are checked into feature tables ({boxes['features']}) or "
        f"quarantine ({boxes['quarantine']}). A point-in-time join gives the training set ({boxes['training_set']}). "
        f"Model versions are trained and deployed as variants. Clients' requests ({arrows['request']}) pass the edge. "
        "Answers and outcomes are logged and monitored. A rollout changes the weights at the edge."
    )


def _evaluation_metrics(evaluation: Json) -> dict[str, Any]:
    metrics = evaluation.get("metrics", {})
    return {name: metrics.get(name) for name in ("ece", "brier", "rows")}


def _split_requests(report: DemoReport) -> int:
    if report.split_requests is not None:
        return report.split_requests
    return int(report.summary.get("requests", {}).get("sent", 0))


def _stages(report: DemoReport) -> list[dict[str, Any]]:
    stages = report.stages or [
        StageRun(name=name, title=name.replace("_", " "), seconds=seconds)
        for name, seconds in report.summary.get("seconds", {}).items()
    ]
    longest = max((stage.seconds for stage in stages), default=0.0) or 1.0
    return [
        {
            "title": stage.title,
            "seconds": stage.seconds,
            "percent": round(100 * stage.seconds / longest, 1),
            "commands": list(stage.commands),
        }
        for stage in stages
    ]
