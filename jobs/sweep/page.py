"""The report of a sweep: one HTML page with the loss of each trial, and by rung. It needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from jobs.pipeline.report.charts import Curve, Dots, dot_chart, line_chart
from jobs.sweep.history import Trial, best_trial
from jobs.train.progress import METRIC


def render(trials: Sequence[Trial], *, model: str, run: str, settings: dict[str, Any]) -> str:
    """Return the page. All texts are escaped.

    Args:
        trials: All trials of the sweep.
        model: Name of the model.
        run: Id of the sweep.
        settings: Settings of the sweep, by dotted name.
    """
    best = best_trial(trials)
    with_loss = [trial for trial in trials if trial.loss is not None]
    dots = [
        Dots(label=f"{trial.number}{' (best)' if trial is best else ''}", values=[trial.loss])
        for trial in with_loss
    ]
    others = [trial for trial in with_loss if trial is not best and len(trial.losses) > 1]
    curves = [_curve(trial) for trial in (*others, *([best] if best and len(best.losses) > 1 else []))]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = (resources.files("jobs.sweep") / "page.html").read_text()
    style = (resources.files("jobs.pipeline.report") / "page.css").read_text()
    return environment.from_string(template).render(
        style=Markup(style),  # noqa: S704 - our own file
        model=model,
        run=run,
        best=best,
        metric=METRIC,
        trials=trials,
        settings=settings,
        by_trial=dot_chart(dots, label=f"{METRIC} of each trial", number=lambda value: f"{value:.4g}"),
        by_rung=line_chart(curves, label=f"{METRIC} by rung", x_label="rung"),
    )


def _curve(trial: Trial) -> Curve:
    return Curve(name=f"trial {trial.number}", points=sorted(trial.losses.items()))
