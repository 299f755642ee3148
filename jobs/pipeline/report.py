"""The demo's report: one self-contained page on which a reader who knows nothing of the run sees what happened."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cluster.ledger import open_ledger
from cluster.session import ClusterRecord
from cluster.storage import layout, local, write_bytes
from jobs.pipeline.config import PipelineConfig
from jobs.pipeline.runner import Runner
from jobs.pipeline.stages import plan
from jobs.pipeline.summary import Summary, quarantine_reasons

NUM_DRIFT_ROWS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that the page shows; parts that are empty are left out."""

    summary: Summary
    titles: dict[str, str]
    """Stage to its title, in order."""
    commands: dict[str, list[str]]
    """Stage to its command lines."""
    reasons: dict[str, dict[str, int]]
    """View to quarantined rows by reason."""
    evaluations: dict[str, dict[str, Any]]
    """Variant to its evaluation."""
    check: dict[str, Any]
    """The rule's finding on the broken version."""
    drift: list[dict[str, Any]]
    plots: dict[str, str]
    """Variant to an SVG."""
    urls: dict[str, str]


def render(report: Report) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value: "–" if value is None else f"{value:.1%}"
    environment.filters["figure"] = lambda value: f"{value:.3f}" if isinstance(value, float | int) else "–"
    environment.filters["svg"] = lambda text: Markup(text)  # noqa: S704 (drawn by jobs.monitor.plots)
    template = environment.get_template("report.html")
    return template.render(report=report, summary=report.summary, total=total(report))


def total(report: Report) -> dict[str, Any]:
    """Sums that the page's first lines need."""
    rows = report.summary["rows"].values()
    return {
        "ingested": sum(view["ingested"] for view in rows),
        "stored": sum(view["stored"] for view in rows),
        "quarantined": sum(view["quarantined"] for view in rows),
        "seconds": sum(report.summary["seconds"].values()),
        "slowest": max(report.summary["seconds"].values(), default=1.0),
    }


def write_report(
    config: PipelineConfig, runner: Runner, summary: Summary, record: ClusterRecord | None, *, demo: Path
) -> None:
    """Gather and write `report.html`."""
    results = runner.results()
    details = results["monitor"]["details"]
    urls = {} if record is None else {"edge": record.edge_url, "Ray dashboard": record.dashboard_url}
    report = Report(
        summary=summary,
        titles={stage.name: stage.title for stage in plan(config, demo)},
        commands={
            name: [f"python -m {shlex.join(command)}" for command in done.commands]
            for name, done in runner.finished.items()
        },
        reasons={view: counts for view, counts in quarantine_reasons(open_ledger(config)).items() if counts},
        evaluations={"champion": results["evaluate_lightgbm"], "challenger": results["evaluate_network"]},
        check=results["check"],
        drift=most_drifted(details.get("champion", {}).get("drift", {})),
        plots=_plots(config, list(details)),
        urls=urls,
    )
    write_bytes(str(demo / "report.html"), render(report).encode())


def most_drifted(drift: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The features with the largest distance in any period, with their distances by period."""
    ranked = sorted(
        drift.items(), key=lambda item: -max((one["value"] for one in item[1].values()), default=0.0)
    )
    return [{"feature": name, "periods": periods} for name, periods in ranked[:NUM_DRIFT_ROWS]]


def _plots(config: PipelineConfig, variants: list[str]) -> dict[str, str]:
    runs = sorted(local(layout(config.storage).monitor(config.name)).glob("*"))
    files = {variant: runs[-1] / f"{variant}.svg" for variant in variants} if runs else {}
    return {variant: path.read_text() for variant, path in files.items() if path.exists()}
