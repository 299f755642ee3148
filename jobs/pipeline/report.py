"""The demo's report."""

from __future__ import annotations

from pathlib import Path

from cluster.session import ClusterRecord
from jobs.pipeline.config import PipelineConfig
from jobs.pipeline.runner import Runner
from jobs.pipeline.summary import Summary


def write_report(
    config: PipelineConfig, runner: Runner, summary: Summary, record: ClusterRecord | None, *, demo: Path
) -> None:
    """Write `report.html`."""
