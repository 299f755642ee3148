"""`docs/reliability.md` from the figures of `make chaos-nodes`."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.nodes.failures import FAILURES, HEAD_DOWN_S, SERVER_DOWN_S
from tests.nodes.outcomes import SETTLED_S

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Figures by system and failure."""
_COLUMNS = (
    "failure",
    "failed",
    "failed at other edges",
    "of these sent later",
    "recovery",
    "longest good answer",
    "lost records",
    "lost pushes",
    "Ray Serve: failed",
    "at other edges",
    "recovery",
    "lost records",
    "lost pushes",
)
_COUNTS = ("failed", "failed_elsewhere", "failed_later")
_LOST = ("records", "pushes")
_TEMPLATE = Path(__file__).with_name("reliability.template.md")


def row(text: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Return the row of one failure."""
    cells = [
        text,
        *(str(ours.get(name, "-")) for name in _COUNTS),
        *(_seconds(ours.get(name)) for name in ("recovery_s", "longest_s")),
        *(str(ours.get(name, "-")) for name in _LOST),
        *(str(theirs.get(name, "-")) for name in _COUNTS[:2]),
        _seconds(theirs.get("recovery_s")),
        *(str(theirs.get(name, "-")) for name in _LOST),
    ]
    return f"| {' | '.join(cells)} |"


def table(results: Results) -> str:
    """Return the figures of all failures as a table of Markdown."""
    ours, theirs = results.get("falaj", {}), results.get("ray_serve", {})
    rows = [
        row(failure.text, ours.get(failure.name, {}), theirs.get(failure.name, {}))
        for failure in FAILURES
        if failure.name in {*ours, *theirs}
    ]
    head_again = ours.get("head", {})
    deployed = ""
    if "deploy_s" in head_again:
        deployed = (
            f"\n\nThe head was killed a second time, and a version was deployed as soon as `cluster.up` had ended: "
            f"`serve_apps.deploy` had ended {head_again['deploy_s']:.0f} s after the failure. At other edges, "
            f"{head_again['deploy_failed_elsewhere']} requests failed, and {head_again['deploy_lost']} records or "
            "pushes were lost."
        )
    head = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    return "\n".join([*head, *rows]) + deployed


def write_report(results: Results, path: Path, *, rate: float) -> None:
    """Write the page."""
    path.write_text(
        _TEMPLATE.read_text().format(
            figures=table(results),
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            falaj=importlib.metadata.version("falaj"),
            ray=importlib.metadata.version("ray"),
            rate=f"{rate:.0f}",
            settled=SETTLED_S,
            head=HEAD_DOWN_S,
            server=SERVER_DOWN_S,
            cores=os.cpu_count(),
        )
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
