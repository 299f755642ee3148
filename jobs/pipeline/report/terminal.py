"""Draw a run's stages on a terminal: one row for each step, stages side by side in one row."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.pipeline.report import formats
from jobs.pipeline.state import RunState, StageState, State

MARKS = {
    State.waiting: "·",
    State.running: "▶",
    State.done: "✔",
    State.failed: "✘",
    State.refused: "✘",
    State.unmet: "✘",
    State.cancelled: "◼",
}


def draw_run(run: RunState, *, is_led: bool) -> Iterator[str]:
    """Yield the lines of a run: the stages in rows, each with what it waits for, and why a stage is not done.

    Args:
        run: The run.
        is_led: Whether a process leads the run now.
    """
    state = run.state.value
    if run.state is State.running and not is_led:
        state = f"stopped; `action=run run={run.run}` goes on"
    yield f"pipeline {run.pipeline}, run {run.run}: {state}"
    layers = run.graph.layers()
    previous: set[str] = set()
    for number, layer in enumerate(layers, start=1):
        for position, stage in enumerate(layer):
            branch = _branch(position, len(layer))
            direct = run.graph.direct(stage.name)
            after = "" if set(direct) == previous else f"  after {', '.join(direct)}"
            row = f"{number:3d}" if position == 0 else "   "
            own = run.stages[stage.name]
            yield f"{row} {branch} {MARKS[own.state]} {stage.name}{_details(own, is_led=is_led)}{after}"
        previous = {stage.name for stage in layer}
    for name, own in run.stages.items():
        if own.reason:
            yield f"{name}: {own.state.value}: {own.reason}"


def _branch(position: int, num_stages: int) -> str:
    if num_stages == 1:
        return " "
    return "┌" if position == 0 else "└" if position == num_stages - 1 else "├"


def _details(stage: StageState, *, is_led: bool) -> str:
    match stage.state:
        case State.waiting:
            return ""
        case State.running:
            return f"  {'running' if is_led else 'started'} as job {stage.job}"
        case _:
            reused = f", done in run {stage.reused_from}" if stage.reused_from else ""
            return f"  {formats.seconds(stage.seconds)}{reused}"
