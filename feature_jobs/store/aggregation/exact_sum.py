"""Sums of fractions that do not depend on the order of addition: the exact sum, rounded once.

Online they are `math.fsum` (Shewchuk 1997). Offline, where sums over overlapping windows are differences of running
totals, each number is cut into whole 32-bit digits at fixed places ("superaccumulator", Kulisch 2002); sums of digits
are exact in int64, and one rounding at the end gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_DIGIT_BITS = 32
_DIGIT = (1 << _DIGIT_BITS) - 1
_LOWEST = 1074
"""The smallest float64 is 2 to the minus this."""
_LARGE = 2.0**990
"""Above this a digit's value, or a sum of digits, could leave float64."""


def exact_sum(values: Sequence[float]) -> float | None:
    """The exact sum rounded to float64; infinite beyond its range, none for infinities of both signs."""
    try:
        return math.fsum(values) + 0.0
    except ValueError:
        return None
    except OverflowError:
        infinite = [value for value in values if math.isinf(value)]
        return exact_sum(infinite) if infinite else _rounded(sum(map(Fraction, values), Fraction()))


@dataclass(frozen=True, slots=True)
class Digits:
    """Numbers as whole digits: a number is the sum of digit[k] * 2 ** (32 * (lowest + k) - 1074)."""

    digits: list[Ints]
    """One array a place, each as long as the numbers; below 2 ** 32 in size."""
    lowest: int

    def add_up(self, sums: Sequence[Ints]) -> Floats:
        """What sums of the digits, place by place, stand for: exact, rounded once."""
        sums = _carried(sums)
        with np.errstate(over="ignore"):
            parts = [np.ldexp(total.astype(np.float64), self._exponent(k)) for k, total in enumerate(sums)]
        large = np.zeros(sums[0].size, bool)
        for part in parts:
            large |= np.abs(part) >= _LARGE
        if large.any():
            parts = [np.where(large, 0.0, part) for part in parts]
        rounded = np.fromiter(map(math.fsum, zip(*parts, strict=True)), np.float64, sums[0].size)
        for place in np.flatnonzero(large):
            whole = sum(int(total[place]) << (_DIGIT_BITS * k) for k, total in enumerate(sums))
            rounded[place] = _rounded(Fraction(whole) * Fraction(2) ** self._exponent(0))
        return rounded

    def _exponent(self, k: int) -> int:
        return _DIGIT_BITS * (self.lowest + k) - _LOWEST


def digits_of(numbers: Floats) -> Digits:
    """Finite numbers cut into digits at fixed places; as many places as they need together."""
    fractions, exponents = np.frexp(np.abs(numbers))
    mantissas = np.ldexp(fractions, 53).astype(np.int64)
    shifts = exponents.astype(np.int64) - 53 + _LOWEST
    # Subnormal numbers have zeros below the smallest place.
    mantissas, shifts = mantissas >> np.maximum(-shifts, 0), np.maximum(shifts, 0)
    places, inner = shifts // _DIGIT_BITS, shifts % _DIGIT_BITS
    used = places[mantissas != 0]
    lowest = int(used.min()) if used.size else 0
    num_places = (int(used.max()) - lowest if used.size else 0) + 3
    low = (mantissas & _DIGIT).astype(np.uint64) << inner.astype(np.uint64)
    rest = (low >> np.uint64(_DIGIT_BITS)).astype(np.int64) + ((mantissas >> _DIGIT_BITS) << inner)
    signs = np.where(numbers < 0, -1, 1)
    cut = np.zeros((num_places, numbers.size), np.int64)
    first, rows = np.clip(places - lowest, 0, num_places - 3), np.arange(numbers.size)
    cut[first, rows] = (low & np.uint64(_DIGIT)).astype(np.int64) * signs
    cut[first + 1, rows] = (rest & _DIGIT) * signs
    cut[first + 2, rows] = (rest >> _DIGIT_BITS) * signs
    return Digits(list(cut), lowest)


def _carried(sums: Sequence[Ints]) -> list[Ints]:
    """The same total with every digit but the highest in 0 to 2 ** 32 - 1, so that each is a float64 exactly."""
    carried = []
    carry = np.zeros_like(sums[0])
    for total in sums[:-1]:
        total = total + carry
        carried.append(total & _DIGIT)
        carry = total >> _DIGIT_BITS
    return [*carried, sums[-1] + carry]


def _rounded(total: Fraction) -> float:
    try:
        return float(total)
    except OverflowError:
        return math.inf if total > 0 else -math.inf


def grown(parts: Sequence[float], value: float) -> list[float]:
    """A few numbers with the same exact sum as the parts and the value (Shewchuk 1997, grow-expansion)."""
    if not abs(value) < _LARGE:
        return [*parts, value]
    grown_parts = []
    for part in parts:
        if not abs(part) < _LARGE:
            grown_parts.append(part)
            continue
        if abs(value) < abs(part):
            value, part = part, value
        total = value + part
        if rest := part - (total - value):
            grown_parts.append(rest)
        value = total
    return [*grown_parts, value]
