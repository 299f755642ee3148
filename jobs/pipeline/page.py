"""The page of the demo's report: one HTML page that explains a run to somebody who knows nothing of it.

`render` is pure: from the run's figures to the page's text. What a run does not have is left out of the page. Style and
pictures are inside the page, so it can be mailed, printed and kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jobs.pipeline import figures, formats
from jobs.pipeline.picture import loop

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRun:
    """One finished stage."""

    name: str
    title: str
    seconds: float
    commands: Sequence[str] = ()
    """Whole command lines, as a person types them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """All that the page is made from; only `summary` must be given, and of it the page shows what is there."""

    summary: Json
    """`summary.json`, as the contract names its keys; `requests` may also have p50_ms and p99_ms, `orphans` counts
    logged predictions whose answer never left."""
    stages: Sequence[StageRun] = ()
    """In the order they ran."""
    evaluations: Mapping[str, Json] = field(default_factory=dict)
    """Variant to the output of `jobs.evaluate`: `metrics` (with `ece`, `brier`, `calibration`) and `slices`."""
    monitor: Json = field(default_factory=dict)
    """The output of `jobs.monitor`: `variants` and `details`."""
    quarantine: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Feature view to reason to rows."""
    check: Json = field(default_factory=dict)
    """The output of `serve_apps.rollout action=check` on the broken version."""
    split_requests: int | None = None
    """Requests that the shares were counted over; none takes all that were sent."""
    urls: Mapping[str, str] = field(default_factory=dict)
    """What can be opened while the cluster is up, by name."""
    finished_at: str = ""
    """As a person reads it."""


def render(report: DemoReport) -> str:
    """The page."""
    folder = resources.files("jobs.pipeline")
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
    return template.render(style=style, **_context(report))


def _context(report: DemoReport) -> dict[str, Any]:
    summary = report.summary
    variants = summary.get("variants", {})
    candidates = [name for name in variants if name != "broken"]
    monitored = summary.get("monitor", {})
    return {
        "finished_at": report.finished_at,
        "headline": _headline(summary),
        "picture": _picture(summary),
        "rows": summary.get("rows", {}),
        "quarantine": figures.quarantine_rows(report.quarantine),
        "training_set": summary.get("training_set"),
        "variants": {name: variants[name] | _extra(report.evaluations.get(name, {})) for name in variants},
        "candidates": candidates,
        "calibration": figures.calibration_chart(report.evaluations, candidates),
        "slices": figures.slice_charts(report.evaluations, candidates),
        "requests": summary.get("requests"),
        "log_rows": summary.get("prediction_log_rows"),
        "orphans": summary.get("orphans"),
        "shares": figures.share_rows(summary.get("shares", {}), _split_requests(report)),
        "share_chart": figures.share_chart(summary.get("shares", {}), _split_requests(report)),
        "monitored": monitored,
        "performance": figures.performance_chart(monitored, report.monitor),
        "drift": figures.drift_rows(report.monitor),
        "broken": variants.get("broken"),
        "check": report.check,
        "rollback_ms": summary.get("rollback_ms"),
        "ledger": summary.get("ledger"),
        "stages": _stages(report),
        "urls": report.urls,
    }


def _headline(summary: Json) -> list[tuple[str, str, str]]:
    """Figure, what it is, and what it says."""
    lines = []
    champion = summary.get("variants", {}).get("champion")
    if champion:
        lines.append(
            (formats.score(champion["auc"]), "AUC of the champion", "on people held out of training")
        )
    requests = summary.get("requests")
    if requests:
        errors = formats.count(requests["errors"], "error")
        answered = formats.integer(requests["sent"] - requests["errors"])
        lines.append(
            (answered, "requests answered", f"of {formats.integer(requests['sent'])} sent, {errors}")
        )
    if summary.get("rollback_ms") is not None:
        lines.append(
            (formats.milliseconds(summary["rollback_ms"]), "to roll back", "a version broken on purpose")
        )
    ledger = summary.get("ledger")
    if ledger:
        verdict = "hash chain verified" if ledger["verified"] else "hash chain BROKEN"
        lines.append((formats.integer(ledger["events"]), "events in the ledger", verdict))
    return lines


def _picture(summary: Json) -> Markup:
    rows, variants = summary.get("rows", {}), summary.get("variants", {})
    total = {
        name: sum(view[name] for view in rows.values()) for name in ("ingested", "stored", "quarantined")
    }
    requests, shares = summary.get("requests"), summary.get("shares", {})
    boxes = {
        "source": f"{len(rows)} views" if rows else "",
        "features": f"{formats.integer(total['stored'])} rows stored" if rows else "",
        "quarantine": f"{formats.integer(total['quarantined'])} rows, with reasons" if rows else "",
        "training_set": _line(
            summary.get("training_set"), lambda one: f"{formats.integer(one['rows'])} rows"
        ),
        "models": f"{len(variants)} registered" if variants else "",
        "online": "read by key",
        "clients": "one person a request",
        "edge": "TLS, identity, sticky split",
        "variants": "\n".join(
            f"{name}: version {variants[name]['version']}" for name in shares if name in variants
        ),
        "log": _line(
            summary.get("prediction_log_rows"),
            lambda count: f"{formats.integer(count)} answers\nand their outcomes",
        ),
        "monitor": "estimated and realised\nperformance, drift",
        "rollout": _line(summary.get("rollback_ms"), lambda ms: f"rolled back in {formats.milliseconds(ms)}"),
        "ledger": _line(summary.get("ledger"), lambda one: f"{formats.integer(one['events'])} events"),
    }
    arrows = {
        "ingest": f"{formats.integer(total['ingested'])} rows" if rows else "ingest",
        "join": "as-of join",
        "train": "train",
        "refuse": "bad rows",
        "materialize": "materialise",
        "read": "features by person",
        "deploy": "deploy",
        "request": _line(
            requests,
            lambda one: f"{formats.integer(one['sent'])} requests, {formats.count(one['errors'], 'error')}",
        ),
        "split": " / ".join(f"{share['weight'] * 100:.0f}" for share in shares.values()),
        "answer": "every answer",
        "observe": "observe",
        "verdict": "verdict",
        "weight": "weights",
    }
    return loop(boxes, arrows, label=_in_words(boxes, arrows))


def _in_words(boxes: Mapping[str, str], arrows: Mapping[str, str]) -> str:
    return (
        f"The loop: census files ({arrows['ingest']}) are checked into feature tables ({boxes['features']}) or "
        f"quarantine ({boxes['quarantine']}); an as-of join gives the training set ({boxes['training_set']}); model "
        f"versions are trained and deployed as variants; clients' requests ({arrows['request']}) pass the edge; "
        "answers and outcomes are logged; the monitor watches them; a rollout changes the weights at the edge."
    )


def _line(value: Any, text: Any) -> str:
    return "" if value is None else str(text(value))


def _extra(evaluation: Json) -> dict[str, Any]:
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
