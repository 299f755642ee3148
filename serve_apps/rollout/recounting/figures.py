"""Compare two texts of a reason: the figures in them must be equal."""

from __future__ import annotations

import math
import re

_FIGURE = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
_TOLERANCE = 1e-6


def first_other_figure(recorded: str, computed: str) -> tuple[str, str] | None:
    """Return the first figure that differs, as recorded and as computed, or None.

    Another release of SciPy may compute other last digits, so a figure may differ by one in its last place. Texts with
    other words are those of another release, and are not compared.
    """
    if _FIGURE.sub("#", recorded) != _FIGURE.sub("#", computed):
        return None
    for one, other in zip(_FIGURE.findall(recorded), _FIGURE.findall(computed), strict=True):
        values = [float(text.replace(",", "")) for text in (one, other)]
        last_place = 0.0 if one.isdigit() else max(_last_place(one), _last_place(other))
        if not math.isclose(*values, rel_tol=_TOLERANCE, abs_tol=last_place * 1.001):
            return one, other
    return None


def _last_place(text: str) -> float:
    """Return the value of one in the last place of a figure; 0 for a whole number."""
    mantissa, _, exponent = text.partition("e")
    places = len(mantissa.partition(".")[2])
    return 0.0 if not places and not exponent else float(10 ** (int(exponent or 0) - places))
