"""Render the page of a run of any pipeline."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from jobs.pipeline.report.page import DemoReport, StageRun, render
from jobs.pipeline.report.stage_graph import stage_graph
from jobs.pipeline.state import RunState, seconds_since


def render_run(run: RunState) -> str:
    """Return the page of a run as HTML: its graph, and the duration and command of each stage."""
    report = DemoReport(
        summary={},
        pipeline=run.pipeline,
        run=f"Run {run.run}: {run.state}",
        reason=run.reason,
        graph=stage_graph(run),
        stages=list(stage_runs(run)),
        finished_at=f"started {run.started_at[:16].replace('T', ' ')} UTC",
    )
    return render(report)


def stage_runs(run: RunState) -> Iterator[StageRun]:
    """Yield the stages that ran, in order. Stages of one group are shown as one."""
    for name, stages in run.graph.groups().items():
        members = [stage for stage in stages if run.stages[stage.name].finished_at]
        if not members:
            continue
        states = [run.stages[stage.name] for stage in members]
        yield StageRun(
            name=name,
            title=next((stage.title for stage in members if stage.title), members[0].label()),
            seconds=sum(group_seconds(run, [stage.name for stage in members])),
            commands=[f"python -m {shlex.join(state.arguments)}" for state in states if state.arguments],
        )


def group_seconds(run: RunState, names: list[str]) -> Iterator[float]:
    """Yield the seconds in which at least one of these stages ran, without the time that they share."""
    spans = sorted(
        (run.stages[name].started_at, run.stages[name].finished_at)
        for name in names
        if run.stages[name].finished_at
    )
    end = ""
    for start, stop in spans:
        if stop > end:
            yield seconds_since(max(start, end), stop)
            end = stop
