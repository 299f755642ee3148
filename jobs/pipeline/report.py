"""Collect the figures of a demo run and write its report page."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from cluster.ledger import open_ledger
from cluster.session import ClusterRecord
from cluster.storage import write_bytes
from jobs.pipeline.config import PipelineConfig
from jobs.pipeline.page import DemoReport, StageRun, render
from jobs.pipeline.runner import Runner
from jobs.pipeline.stages import plan
from jobs.pipeline.summary import CANDIDATES, Summary, quarantine_reasons, select_versions


def write_report(
    config: PipelineConfig, runner: Runner, summary: Summary, record: ClusterRecord | None, *, demo: Path
) -> None:
    """Write `report.html` into the demo's folder."""
    results = runner.results()
    report = DemoReport(
        summary=summary,
        stages=_stages(config, runner, demo),
        evaluations={
            variant: results[f"evaluate_{output}"]
            for variant, output in CANDIDATES.items()
            if f"evaluate_{output}" in results
        },
        monitor=select_versions(results["monitor"], summary["variants"]),
        quarantine=quarantine_reasons(open_ledger(config)),
        check=results["check"],
        split_requests=_split_requests(demo),
        urls=_urls(record),
        finished_at=f"{datetime.now(UTC):%-d %B %Y, %H:%M} UTC",
    )
    write_bytes(str(demo / "report.html"), render(report).encode())


def _stages(config: PipelineConfig, runner: Runner, demo: Path) -> list[StageRun]:
    return [
        StageRun(
            name=stage.name,
            title=stage.title,
            seconds=runner.finished[stage.name].seconds,
            commands=[f"python -m {shlex.join(command)}" for command in runner.finished[stage.name].commands],
        )
        for stage in plan(config, demo)
        if stage.name in runner.finished
    ]


def _split_requests(demo: Path) -> int:
    """Count the answers that the shares are computed from: all answers except those of the broken version's rollout."""
    files = (path for path in demo.glob("answers_*.parquet") if path.stem != "answers_broken")
    return sum(pl.scan_parquet(path).select(pl.len()).collect().item() for path in files)


def _urls(record: ClusterRecord | None) -> dict[str, str]:
    if record is None:
        return {}
    return {"Edge": record.edge_url, "Ray dashboard": record.dashboard_url, "Metrics": record.metrics_url}
