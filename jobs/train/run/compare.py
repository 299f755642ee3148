"""Compare two runs side by side: settings that differ, losses by step, and the metrics of their versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from cluster.errors import ConfigError, did_you_mean
from cluster.ledger import Ledger
from cluster.ledger.events import RunFinished, RunStarted
from cluster.security.keys.access import KeyAccess
from jobs.train.run.files import run_files

ROWS = 12
"""The table has at most about this many steps."""
WIDTH, HEIGHT, MARGIN = 640, 320, 56
_COLORS = ("#2a78b8", "#c8622b")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What is known of a run."""

    run: str
    settings: dict[str, Any]
    metrics: dict[str, Any]
    """Metrics of the registered version; empty if the run is not finished."""
    curves: dict[str, dict[tuple[int, int], float]]
    """Maps the name of a loss to its values by epoch and step."""


def read_run(ledger: Ledger, run: str, *, root: str, access: KeyAccess) -> RunRecord:
    """Return a run with its metrics by step.

    Raises:
        ConfigError: There is no such run.
        AccessDenied: The caller has no right to use the model's key.
    """
    started = ledger.newest(RunStarted, run=run)
    if started is None:
        known = {str(entry.payload["run"]) for entry in ledger.entries(RunStarted)}
        raise ConfigError(f"No run '{run}'.{did_you_mean(run, known)}")
    model = str(started.payload["model"])
    finished = ledger.newest(RunFinished, model=model, run=run)
    files = run_files(root, model=model, run=run, access=access)
    curves: dict[str, dict[tuple[int, int], float]] = {}
    for name in files.names("metrics"):
        for entry in json.loads(files.read(f"metrics/{name}")):
            for loss, value in entry["values"].items():
                curves.setdefault(loss, {})[entry["epoch"], entry["step"]] = value
    return RunRecord(
        run=run,
        settings=started.payload["settings"],
        metrics=finished.payload["metrics"] if finished is not None else {},
        curves={name: dict(sorted(curve.items())) for name, curve in curves.items()},
    )


def comparison_table(runs: Sequence[RunRecord]) -> list[str]:
    """Return the comparison as lines of text."""
    first, second = runs
    rows = [("", first.run, second.run)]
    for name in sorted(first.settings.keys() | second.settings.keys()):
        values = first.settings.get(name), second.settings.get(name)
        if values[0] != values[1]:
            rows.append((name, str(values[0]), str(values[1])))
    for loss in sorted(first.curves.keys() | second.curves.keys()):
        curves = first.curves.get(loss, {}), second.curves.get(loss, {})
        steps = sorted(curves[0].keys() | curves[1].keys())
        every = -(-len(steps) // ROWS)
        for step in [*steps[:-1:every], *steps[-1:]]:
            name = f"{loss}, epoch {step[0] + 1} step {step[1]}"
            rows.append((name, _number(curves[0].get(step)), _number(curves[1].get(step))))
    for name, value in first.metrics.items():
        if isinstance(value, int | float) and name in second.metrics:
            rows.append((name, _number(value), _number(second.metrics[name])))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]


def comparison_plot(runs: Sequence[RunRecord]) -> str:
    """Return a plot of both runs as SVG. It has a line for each loss; the losses of an epoch's end have dots, too."""
    losses = [
        (index, name, list(curve.values()))
        for index, record in enumerate(runs)
        for name, curve in record.curves.items()
        if name != "learning_rate"
    ]
    values = [value for _, _, curve in losses for value in curve]
    low, high = min(values, default=0.0), max(values, default=1.0)
    spread = (high - low) or 1.0
    parts = []
    for number, (index, name, curve) in enumerate(losses):
        points = " ".join(
            f"{MARGIN + (WIDTH - 2 * MARGIN) * (n + 1) / len(curve):.1f},"
            f"{HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / spread:.1f}"
            for n, value in enumerate(curve)
        )
        dash = ' stroke-dasharray="5 3"' if name.startswith("validation") else ""
        parts.append(
            f'<polyline fill="none" stroke="{_COLORS[index]}" stroke-width="1.5"{dash} points="{points}"/>'
        )
        label = escape(f"{runs[index].run}: {name}")
        parts.append(f'<text x="{MARGIN}" y="{16 + 14 * number}" fill="{_COLORS[index]}">{label}</text>')
    for text, y in ((f"{high:.4g}", MARGIN), (f"{low:.4g}", HEIGHT - MARGIN)):
        parts.append(f'<text x="4" y="{y}" fill="#667">{text}</text>')
    title = escape(f"Losses of the runs {runs[0].run} and {runs[1].run}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"<title>{title}</title><style>text{{font:12px system-ui,sans-serif}}</style>{''.join(parts)}</svg>"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
