"""Print the demo's summary on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.session import ClusterRecord
from jobs.pipeline.census.summary import Summary
from jobs.pipeline.report.formats import score


def print_summary(summary: Summary, record: ClusterRecord | None, *, seconds: float, demo: Path) -> None:
    """Print the summary, the addresses of the running cluster, and the path of the report."""
    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, value in _lines(summary):
        table.add_row(label, value)
    console.print()
    console.print(table)
    console.print()
    if record is not None:
        for label, url in (
            ("edge", record.edge_url),
            ("Ray dashboard", record.dashboard_url),
            ("metrics", record.metrics_url),
        ):
            console.print(f"{label:14} {url}", highlight=False)
    console.print(f"{'report':14} {demo / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(f"{'took':14} {seconds:.0f} s; `make down` stops the cluster", highlight=False)


def _lines(summary: Summary) -> list[tuple[str, str]]:
    lines = [
        (
            f"rows {view}",
            f"{rows['ingested']:,} in = {rows['stored']:,} stored + {rows['quarantined']:,} quarantined",
        )
        for view, rows in summary["rows"].items()
    ]
    lines.append(
        ("training set", f"{summary['training_set']['rows']:,} rows, {summary['training_set']['hash'][:16]}")
    )
    lines += [
        (
            variant,
            f"{model['family']} v{model['version']}: AUC {model['auc']:.4f}, accuracy {model['accuracy']:.4f}",
        )
        for variant, model in summary["variants"].items()
    ]
    requests = summary["requests"]
    lines.append(
        (
            "requests",
            f"{requests['sent']:,} sent, {requests['errors']} errors, p50 {requests['p50_ms']:.1f} ms",
        )
    )
    lines.append(
        ("log rows", f"{summary['prediction_log_rows']:,}, {summary['orphans']} of them without an answer")
    )
    if others := summary["others"]:
        lines.append(("other clients", f"{others:,} logged predictions"))
    lines += [
        (f"share {variant}", f"{share['share']:.3f} (weight {share['weight']:.2f})")
        for variant, share in summary["shares"].items()
    ]
    for variant, years in summary["monitor"].items():
        figures = ", ".join(
            f"{year} {score(auc['estimated_auc'])}/{score(auc['realised_auc'])}"
            for year, auc in years.items()
        )
        lines.append((f"AUC {variant}", f"estimated/realised: {figures}"))
    lines.append(("rollback", f"{summary['rollback_ms']:.0f} ms from the event to the edge"))
    lines.append(("ledger", f"{summary['ledger']['events']} events, verified"))
    return lines
