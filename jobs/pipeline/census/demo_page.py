"""Collect the figures of a demo run and write its report page."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from cluster.ledger import open_ledger
from cluster.session import ClusterRecord
from cluster.storage import write_bytes
from jobs.pipeline.census.summary import (
    CANDIDATES,
    Summary,
    quarantine_reasons,
    read_output,
    select_versions,
)
from jobs.pipeline.config import PipelineConfig
from jobs.pipeline.report.page import DemoReport, render
from jobs.pipeline.report.runs import stage_runs
from jobs.pipeline.report.stage_graph import stage_graph
from jobs.pipeline.state import RunState


def write_report(
    config: PipelineConfig, run: RunState, summary: Summary, record: ClusterRecord | None, *, demo: Path
) -> None:
    """Write `report.html` into the demo's folder."""
    report = DemoReport(
        summary=summary,
        stages=list(stage_runs(run)),
        graph=stage_graph(run),
        evaluations={
            variant: evaluation
            for variant, stage in CANDIDATES.items()
            if (evaluation := read_output(demo, stage.replace("train_", "evaluate_")))
        },
        monitor=select_versions(read_output(demo, "monitor"), summary["variants"]),
        quarantine=quarantine_reasons(open_ledger(config)),
        check=read_output(demo, "check"),
        split_requests=_split_requests(demo),
        urls=_urls(record),
        finished_at=f"{datetime.now(UTC):%-d %B %Y, %H:%M} UTC",
    )
    write_bytes(str(demo / "report.html"), render(report).encode())


def _split_requests(demo: Path) -> int:
    """Count the answers that the shares are computed from: all answers except those of the broken version's rollout."""
    files = (path for path in demo.glob("answers_*.parquet") if path.stem != "answers_broken")
    return sum(pl.scan_parquet(path).select(pl.len()).collect().item() for path in files)


def _urls(record: ClusterRecord | None) -> dict[str, str]:
    if record is None:
        return {}
    return {"Edge": record.edge_url, "Ray dashboard": record.dashboard_url, "Metrics": record.metrics_url}
