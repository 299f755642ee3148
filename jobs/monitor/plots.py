"""Draw the monitor's plot as SVG text. A plot has about a dozen points, so no plotting library is needed."""

from __future__ import annotations

from html import escape
from typing import Any

WIDTH, HEIGHT, MARGIN = 560, 240, 48


def performance_plot(variant: str, periods: dict[str, dict[str, Any]], *, metric: str) -> str:
    """Return a plot of the performance in each period: estimated, with its interval, and realised.

    Args:
        variant: Variant from the log. It is escaped, because older releases logged any text that a client sent.
        periods: Figures by period.
        metric: Name of the metric.
    """
    estimates = [period["estimate"] for period in periods.values()]
    realisations = [period["realisation"] for period in periods.values()]
    values = [
        value
        for estimate in estimates
        if estimate
        for value in (estimate["value"], estimate["lower"], estimate["upper"])
        if value is not None
    ]
    values += [realisation["value"] for realisation in realisations if realisation]
    low, high = min(values, default=0.0), max(values, default=1.0)
    padding = (high - low) * 0.15 or 0.01
    scale = _Scale(low - padding, high + padding, len(periods))
    parts = [_axes(scale, list(periods), metric)]
    for position, (estimate, realisation) in enumerate(zip(estimates, realisations, strict=True)):
        x = scale.x(position)
        if estimate and estimate["lower"] is not None and estimate["upper"] is not None:
            parts.append(_line(x, scale.y(estimate["lower"]), x, scale.y(estimate["upper"]), "band"))
        if estimate:
            parts.append(
                f'<circle class="estimated" cx="{x:.1f}" cy="{scale.y(estimate["value"]):.1f}" r="5"/>'
            )
        if realisation:
            y = scale.y(realisation["value"])
            parts.append(f'<rect class="realised" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>')
    label = f"{escape(variant)}: {metric}, estimated (circle) and realised (square) per period"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"<title>{label}</title><style>{_STYLE}</style>{''.join(parts)}</svg>"
    )


_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#667}line{stroke:#bbc;stroke-width:1}"
    "line.band{stroke:#2a78b8;stroke-width:2;opacity:.5}circle.estimated{fill:#2a78b8}rect.realised{fill:#c8622b}"
)


class _Scale:
    """Conversion from periods and values to coordinates."""

    def __init__(self, low: float, high: float, count: int) -> None:
        self.low, self.high, self._count = low, high, count

    def x(self, position: int) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (position + 0.5) / self._count

    def y(self, value: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - self.low) / (self.high - self.low)


def _axes(scale: _Scale, periods: list[str], metric: str) -> str:
    parts = []
    for step in range(5):
        value = scale.low + (scale.high - scale.low) * step / 4
        y = scale.y(value)
        parts.append(_line(MARGIN, y, WIDTH - MARGIN, y, "grid"))
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3f}</text>')
    for position, period in enumerate(periods):
        parts.append(
            f'<text x="{scale.x(position):.1f}" y="{HEIGHT - MARGIN + 20}" text-anchor="middle">{period}</text>'
        )
    parts.append(f'<text x="{MARGIN}" y="{MARGIN - 16}">{metric}</text>')
    return "".join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
