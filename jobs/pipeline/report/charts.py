"""Draw the report's charts as SVG text.

A chart has about a dozen points, so no plotting library is needed. The page's style sheet sets the colours. All
functions are pure and escape their text. Each chart has a label for screen readers. The points of two series differ in
shape and in colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 720
"""Width of a chart in pixels."""
ROW = 26
"""Height of one row of a dot chart in pixels."""
LABEL = 190
"""Width of the labels of a dot chart in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Estimated and realised figure of one period. An unknown figure is None."""

    period: str
    estimated: float | None = None
    lower: float | None = None
    upper: float | None = None
    realised: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Dots:
    """One row of a dot chart."""

    label: str
    values: Sequence[float | None]
    """One value for each series. None draws no dot."""
    band: tuple[float, float] | None = None
    """Range to draw behind the dots."""
    mark: float | None = None
    """Position of a vertical line: a threshold or a target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One series of points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def interval_chart(panels: dict[str, list[Interval]], *, label: str) -> Markup:
    """Draw one panel for each variant: estimates with intervals, and realised figures. All panels have one scale."""
    known = [value for rows in panels.values() for row in rows for value in _values(row)]
    if not known:
        return Markup("")
    ticks = nice_ticks(min(known), max(known))
    top, bottom, height = 34, 216, 250
    y = _scale(ticks[0], ticks[-1], bottom, top)
    width = (WIDTH - 50) / len(panels)
    parts = [_tick_rows(ticks, y)]
    for number, (name, rows) in enumerate(panels.items()):
        left = 50 + number * width
        parts.append(_text(left + width / 2, 16, name, "head middle"))
        for position, row in enumerate(rows):
            x = left + width * (position + 0.5) / len(rows)
            parts += [_interval(x, y, row), _text(x, bottom + 22, row.period, "middle")]
    return _svg(WIDTH, height, label, parts)


def dot_chart(rows: Sequence[Dots], *, label: str, number: Callable[[float], str]) -> Markup:
    """Draw one row of dots for each label. `number` formats a value as text."""
    known = [
        value for row in rows for value in (*row.values, *(row.band or ()), row.mark) if value is not None
    ]
    if not known:
        return Markup("")
    ticks = nice_ticks(min(known), max(known))
    x = _scale(ticks[0], ticks[-1], LABEL, WIDTH - 70)
    bottom = 10 + ROW * len(rows)
    parts = [
        Markup('<line class="grid" x1="{0:.1f}" y1="6" x2="{0:.1f}" y2="{1}"/>').format(x(tick), bottom)
        + _text(x(tick), bottom + 18, number(tick), "middle")
        for tick in ticks
    ]
    for position, row in enumerate(rows):
        parts.append(_dot_row(row, x, y=10 + ROW * (position + 0.5), number=number))
    return _svg(WIDTH, bottom + 28, label, parts)


def calibration_plot(curves: Sequence[Curve], *, label: str) -> Markup:
    """Draw observed rates against predicted probabilities. A perfectly calibrated model gives the diagonal."""
    size, left = 300, 52
    x, y = _scale(0, 1, left, left + size), _scale(0, 1, size + 10, 10)
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    parts = [
        Markup('<line class="grid" x1="{0}" y1="{1:.1f}" x2="{2}" y2="{1:.1f}"/>').format(
            left, y(t), left + size
        )
        + _text(left - 8, y(t) + 4, f"{t:.2f}", "end")
        + _text(x(t), size + 28, f"{t:.2f}", "middle")
        for t in ticks
    ]
    parts.append(
        Markup('<line class="mark" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x(0), y(0), x(1), y(1))
    )
    for number, curve in enumerate(curves):
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in curve.points)
        parts.append(Markup('<polyline class="curve s{}" points="{}"/>').format(number, path))
        parts += [symbol(x(px), y(py), number) for px, py in curve.points]
    parts.append(_text(left + size / 2, size + 50, "predicted probability", "middle"))
    parts.append(
        Markup('<text class="middle" transform="translate(12 {}) rotate(-90)">observed rate</text>').format(
            10 + size // 2
        )
    )
    return _svg(left + size + 20, size + 60, label, parts)


def line_chart(curves: Sequence[Curve], *, label: str, x_label: str) -> Markup:
    """Draw a line for each curve, with whole numbers on the x axis. The last curve is highlighted."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return Markup("")
    left, bottom, top = 56, 260, 14
    ticks = nice_ticks(min(value for _, value in points), max(value for _, value in points))
    last = max(max(px for px, _ in points), 2)
    x, y = _scale(1, last, left, WIDTH - 20), _scale(ticks[0], ticks[-1], bottom, top)
    every = max(1, round(last / 12))
    parts = [_tick_rows(ticks, y)]
    parts += [
        _text(x(number), bottom + 20, str(number), "middle") for number in range(1, int(last) + 1, every)
    ]
    for number, curve in enumerate(curves):
        series = 1 if number == len(curves) - 1 else 0
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in curve.points)
        parts.append(
            Markup('<polyline class="curve s{}" points="{}"><title>{}</title></polyline>').format(
                series, path, curve.name
            )
        )
    parts.append(_text(left + (WIDTH - left) / 2, bottom + 40, x_label, "middle"))
    return _svg(WIDTH, bottom + 50, label, parts)


def symbol(x: float, y: float, series: int) -> Markup:
    """Draw the point of a series: a circle, a square or a diamond."""
    match series % 3:
        case 0:
            return Markup('<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="5"/>').format(series, x, y)
        case 1:
            return Markup('<rect class="s{}" x="{:.1f}" y="{:.1f}" width="9" height="9"/>').format(
                series, x - 4.5, y - 4.5
            )
        case _:
            return Markup('<path class="s{0}" d="M{1:.1f} {2:.1f}l6 6-6 6-6-6z"/>').format(series, x, y - 6)


def legend(names: Sequence[str]) -> Markup:
    """Draw the legend: the symbol and the name of each series."""
    items = (
        Markup(
            '<li><svg viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{}</svg>{}</li>'
        ).format(symbol(7, 7, number), name)
        for number, name in enumerate(names)
    )
    return Markup('<ul class="key">{}</ul>').format(Markup("").join(items))


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return about `count` round numbers that cover the range from `low` to `high`."""
    span = max(high - low, abs(high) * 0.02, 1e-6)
    raw = span / (count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _values(row: Interval) -> Iterable[float]:
    return (value for value in (row.estimated, row.lower, row.upper, row.realised) if value is not None)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _interval(x: float, y: Callable[[float], float], row: Interval) -> Markup:
    markup = Markup("")
    if row.lower is not None and row.upper is not None:
        markup += Markup('<line class="bar s0" x1="{0:.1f}" y1="{1:.1f}" x2="{0:.1f}" y2="{2:.1f}"/>').format(
            x - 9, y(row.lower), y(row.upper)
        )
    if row.estimated is not None:
        markup += symbol(x - 9, y(row.estimated), 0)
    if row.realised is not None:
        markup += symbol(x + 9, y(row.realised), 1)
    return markup


def _dot_row(row: Dots, x: Callable[[float], float], *, y: float, number: Callable[[float], str]) -> Markup:
    markup = _text(LABEL - 14, y + 4, row.label, "end")
    if row.band is not None:
        markup += Markup('<rect class="band" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="12"/>').format(
            x(row.band[0]), y - 6, max(x(row.band[1]) - x(row.band[0]), 2)
        )
    if row.mark is not None:
        markup += Markup('<line class="mark" x1="{0:.1f}" y1="{1:.1f}" x2="{0:.1f}" y2="{2:.1f}"/>').format(
            x(row.mark), y - 9, y + 9
        )
    for series, value in enumerate(row.values):
        if value is not None:
            markup += symbol(x(value), y, series)
    single_value = row.values[0] if len(row.values) == 1 else None
    return markup + _text(WIDTH - 60, y + 4, "" if single_value is None else number(single_value), "value")


def _tick_rows(ticks: list[float], y: Callable[[float], float]) -> Markup:
    return Markup("").join(
        Markup('<line class="grid" x1="46" y1="{0:.1f}" x2="{1}" y2="{0:.1f}"/>').format(y(tick), WIDTH)
        + _text(40, y(tick) + 4, f"{tick:.3f}", "end")
        for tick in ticks
    )


def _text(x: float, y: float, content: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, content)


def _svg(width: float, height: float, label: str, parts: Iterable[Markup]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {0:.0f} {1:.0f}" role="img" aria-label="{2}" style="max-width:{0:.0f}px">'
        "<title>{2}</title>{3}</svg>"
    ).format(width, height, escape(label), Markup("").join(parts))
