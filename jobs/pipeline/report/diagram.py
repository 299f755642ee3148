"""Draw the diagram of the whole loop as SVG text, with the numbers of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from markupsafe import Markup

# All coordinates and sizes are in pixels.
_WIDTH, _HEIGHT = 1040, 464
_COLUMNS = (8, 292, 576, 860)
"""Left edge of each column of boxes."""
_ROWS = (14, 136, 258, 380)
"""Top edge of each row of boxes."""
_BOX_WIDTH, _BOX_HEIGHT = 172, 70
_LINE_HEIGHT = 17


class _Box(NamedTuple):
    """A box at a position of the grid."""

    column: int
    row: int
    title: str


class _Arrow(NamedTuple):
    """An arrow with a text."""

    path: str
    """SVG path."""
    text_x: int
    text_y: int
    align: str = "middle"
    """Alignment of the text at `text_x`: start, middle or end."""


_BOXES = {
    "source": _Box(0, 0, "Census files"),
    "features": _Box(1, 0, "Feature tables"),
    "training_set": _Box(2, 0, "Training set"),
    "models": _Box(3, 0, "Model versions"),
    "quarantine": _Box(0, 1, "Quarantine"),
    "online": _Box(1, 1, "Online store"),
    "clients": _Box(0, 2, "Clients"),
    "edge": _Box(2, 2, "Edge"),
    "variants": _Box(3, 2, "Variants"),
    "ledger": _Box(0, 3, "Ledger"),
    "rollout": _Box(1, 3, "Rollout"),
    "monitor": _Box(2, 3, "Monitor"),
    "log": _Box(3, 3, "Prediction log"),
}
_ARROWS = {
    "ingest": _Arrow("M180 49H290", 235, 40),
    "join": _Arrow("M464 49H574", 519, 40),
    "train": _Arrow("M748 49H858", 803, 40),
    "refuse": _Arrow("M94 84V134", 100, 114, "start"),
    "materialize": _Arrow("M378 84V134", 384, 114, "start"),
    "read": _Arrow("M464 171H906V256", 660, 162),
    "deploy": _Arrow("M986 84V256", 980, 124, "end"),
    "request": _Arrow("M180 293H574", 377, 284),
    "split": _Arrow("M748 293H858", 803, 284),
    "answer": _Arrow("M946 328V378", 940, 358, "end"),
    "observe": _Arrow("M860 415H750", 805, 406),
    "verdict": _Arrow("M576 415H466", 521, 406),
    "weight": _Arrow("M378 380V352H662V330", 520, 345),
}


def loop_diagram(boxes: Mapping[str, str], arrows: Mapping[str, str], *, label: str) -> Markup:
    """Draw the diagram of the loop.

    Args:
        boxes: From the name of a box to the text below its title. A box without text shows only its title.
        arrows: From the name of an arrow to its text.
        label: Description of the diagram for screen readers.
    """
    shapes = [_draw_arrow(arrow, arrows.get(name, "")) for name, arrow in _ARROWS.items()]
    shapes += [_draw_box(box, boxes.get(name, ""), name) for name, box in _BOXES.items()]
    return Markup(
        '<svg class="loop" viewBox="0 0 {} {}" role="img" aria-label="{}"><defs><marker id="tip" viewBox="0 0 8 8" '
        'refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0l8 4-8 4z"/></marker></defs>'
        "{}</svg>"
    ).format(_WIDTH, _HEIGHT, label, Markup("").join(shapes))


def _draw_box(box: _Box, text: str, name: str) -> Markup:
    x, y = _COLUMNS[box.column], _ROWS[box.row]
    lines = [line for line in text.split("\n") if line]
    title_y = y + (_BOX_HEIGHT - _LINE_HEIGHT * len(lines)) / 2 + 5
    content = Markup('<text class="title" x="{}" y="{:.0f}">{}</text>').format(
        x + _BOX_WIDTH / 2, title_y, box.title
    )
    for number, line in enumerate(lines, start=1):
        content += Markup('<text class="middle" x="{}" y="{:.0f}">{}</text>').format(
            x + _BOX_WIDTH / 2, title_y + _LINE_HEIGHT * number, line
        )
    return Markup('<g class="box {}"><rect x="{}" y="{}" width="{}" height="{}" rx="5"/>{}</g>').format(
        name, x, y, _BOX_WIDTH, _BOX_HEIGHT, content
    )


def _draw_arrow(arrow: _Arrow, text: str) -> Markup:
    return Markup(
        '<path class="arrow" d="{}" marker-end="url(#tip)"/><text class="{}" x="{}" y="{}">{}</text>'
    ).format(arrow.path, arrow.align, arrow.text_x, arrow.text_y, text)
