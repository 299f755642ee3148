"""The picture of the loop, with one run's numbers in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

_COLUMNS = (8, 292, 576, 860)
_ROWS = (14, 136, 258, 380)
_BOX_WIDTH, _BOX_HEIGHT = 172, 70
_WIDTH, _HEIGHT = 1040, 464


@dataclass(frozen=True, slots=True)
class _Box:
    column: int
    row: int
    title: str


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
    # Name: the path, and where its label stands.
    "ingest": ("M180 49H290", (235, 40)),
    "join": ("M464 49H574", (519, 40)),
    "train": ("M748 49H858", (803, 40)),
    "refuse": ("M94 84V134", (100, 114)),
    "materialize": ("M378 84V134", (384, 114)),
    "read": ("M464 171H906V256", (660, 162)),
    "deploy": ("M986 84V256", (980, 124)),
    "request": ("M180 293H574", (377, 284)),
    "split": ("M748 293H858", (803, 284)),
    "answer": ("M946 328V378", (940, 358)),
    "observe": ("M860 415H750", (805, 406)),
    "verdict": ("M576 415H466", (521, 406)),
    "weight": ("M378 380V352H662V330", (520, 345)),
}
_ALIGN = {"refuse": "start", "materialize": "start", "deploy": "end", "answer": "end"}


def loop(boxes: Mapping[str, str], arrows: Mapping[str, str], *, label: str) -> Markup:
    """The loop's picture.

    Args:
        boxes: what stands below a box's title, by its name; a box without a text has its title alone.
        arrows: what stands on an arrow, by its name.
        label: the same in words, for those who do not see it.
    """
    drawn = [_arrow(path, at, arrows.get(name, ""), name) for name, (path, at) in _ARROWS.items()]
    drawn += [_box(box, boxes.get(name, ""), name) for name, box in _BOXES.items()]
    return Markup(
        '<svg class="loop" viewBox="0 0 {} {}" role="img" aria-label="{}"><defs><marker id="tip" viewBox="0 0 8 8" '
        'refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0l8 4-8 4z"/></marker></defs>'
        "{}</svg>"
    ).format(_WIDTH, _HEIGHT, label, Markup("").join(drawn))


def _box(box: _Box, text: str, name: str) -> Markup:
    x, y = _COLUMNS[box.column], _ROWS[box.row]
    lines = [line for line in text.split("\n") if line]
    start = y + (_BOX_HEIGHT - 17 * len(lines)) / 2 + 5
    shown = Markup('<text class="title" x="{}" y="{:.0f}">{}</text>').format(
        x + _BOX_WIDTH / 2, start, box.title
    )
    for number, line in enumerate(lines, start=1):
        shown += Markup('<text class="middle" x="{}" y="{:.0f}">{}</text>').format(
            x + _BOX_WIDTH / 2, start + 17 * number, line
        )
    return Markup('<g class="box {}"><rect x="{}" y="{}" width="{}" height="{}" rx="5"/>{}</g>').format(
        name, x, y, _BOX_WIDTH, _BOX_HEIGHT, shown
    )


def _arrow(path: str, at: tuple[int, int], text: str, name: str) -> Markup:
    return Markup(
        '<path class="arrow" d="{}" marker-end="url(#tip)"/><text class="{}" x="{}" y="{}">{}</text>'
    ).format(path, _ALIGN.get(name, "middle"), *at, text)
