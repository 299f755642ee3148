"""Draw the stages of a pipeline as SVG text: a row for each step, with an arrow from each stage to the next ones."""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup

from jobs.pipeline.report import formats
from jobs.pipeline.state import RunState, State

# All coordinates and sizes are in pixels.
_WIDTH, _MAX_BOX, _BOX_HEIGHT, _GAP, _ROW = 1040, 230, 46, 18, 74
_MAX_CHARACTERS = 30


class _Position(NamedTuple):
    x: float
    y: float
    width: float


def stage_graph(run: RunState) -> Markup:
    """Draw the stages of a run with their states and durations."""
    layers = run.graph.layers()
    positions: dict[str, _Position] = {}
    for row, layer in enumerate(layers):
        width = min(_MAX_BOX, (_WIDTH - _GAP * (len(layer) + 1)) / len(layer))
        left = (_WIDTH - len(layer) * width - (len(layer) - 1) * _GAP) / 2
        for column, stage in enumerate(layer):
            positions[stage.name] = _Position(left + column * (width + _GAP), 8 + row * _ROW, width)
    arrows = [
        _arrow(positions[before], positions[name])
        for name in run.graph.stages
        for before in run.graph.direct(name)
    ]
    boxes = [_box(position, run, name) for name, position in positions.items()]
    label = "; ".join(
        f"{name} ({run.stages[name].state})" + (f" after {', '.join(direct)}" if direct else "")
        for name in run.graph.stages
        for direct in [run.graph.direct(name)]
    )
    return Markup('<svg class="loop" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, len(layers) * _ROW, f"Stages: {label}", Markup("").join([*arrows, *boxes])
    )


def _arrow(start: _Position, end: _Position) -> Markup:
    x1, y1 = start.x + start.width / 2, start.y + _BOX_HEIGHT
    x2, y2 = end.x + end.width / 2, end.y
    middle = (y1 + y2) / 2
    return Markup(
        '<path class="arrow" d="M{:.0f} {:.0f}C{:.0f} {:.0f} {:.0f} {:.0f} {:.0f} {:.0f}"/>'
    ).format(x1, y1, x1, middle, x2, middle, x2, y2)


def _box(position: _Position, run: RunState, name: str) -> Markup:
    stage = run.stages[name]
    text = stage.state.value
    if stage.state not in (State.waiting, State.running):
        text = f"{text}, {formats.seconds(stage.seconds)}"
    shown = name if len(name) <= _MAX_CHARACTERS else f"{name[: _MAX_CHARACTERS - 1]}…"
    x = position.x + position.width / 2
    return Markup(
        '<g class="box {}"><rect x="{:.0f}" y="{:.0f}" width="{:.0f}" height="{}" rx="5"/>'
        '<text class="title" x="{:.0f}" y="{:.0f}">{}</text><text class="middle" x="{:.0f}" y="{:.0f}">{}</text></g>'
    ).format(
        stage.state,
        position.x,
        position.y,
        position.width,
        _BOX_HEIGHT,
        x,
        position.y + 19,
        shown,
        x,
        position.y + 36,
        text,
    )
