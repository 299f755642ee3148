"""Sums of floats that do not depend on the order of addition: the exact sum, rounded once.

Online, `math.fsum` is used (Shewchuk 1997). Offline, sums over overlapping windows are differences of running totals.
There, each number is split into 32-bit digits at fixed positions ("superaccumulator", Kulisch 2002). Sums of digits are
exact in int64, and one rounding at the end gives the same bits as online.
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
_MIN_EXPONENT = 1074
"""The smallest positive float64 is 2 ** -_MIN_EXPONENT."""
_LARGE = 2.0**990
"""Above this, the value of a digit or a sum of digits could be outside float64."""


def exact_sum(values: Sequence[float]) -> float | None:
    """Return the exact sum, rounded to float64. Too large sums are infinite; inf and -inf together give None."""
    try:
        return math.fsum(values) + 0.0
    except ValueError:
        return None
    except OverflowError:
        infinite = [value for value in values if math.isinf(value)]
        return exact_sum(infinite) if infinite else _rounded(sum(map(Fraction, values), Fraction()))


@dataclass(frozen=True, slots=True)
class Digits:
    """Numbers split into digits. A number is the sum of digits[k] * 2 ** (32 * (lowest + k) - 1074)."""

    digits: list[Ints]
    """One array per position, with one digit per number. A digit's absolute value is less than 2 ** 32."""
    lowest: int
    """Position of the lowest digit."""

    def total(self, sums: Sequence[Ints]) -> Floats:
        """Return the numbers that sums of digits represent, rounded once.

        Args:
            sums: One array per position, with one sum of digits per result.
        """
        sums = _carried(sums)
        with np.errstate(over="ignore"):
            parts = [np.ldexp(total.astype(np.float64), self._exponent(k)) for k, total in enumerate(sums)]
        large = np.zeros(sums[0].size, bool)
        for part in parts:
            large |= np.abs(part) >= _LARGE
        if large.any():
            parts = [np.where(large, 0.0, part) for part in parts]
        rounded = np.fromiter(map(math.fsum, zip(*parts, strict=True)), np.float64, sums[0].size)
        for index in np.flatnonzero(large):
            whole = sum(int(total[index]) << (_DIGIT_BITS * k) for k, total in enumerate(sums))
            rounded[index] = _rounded(Fraction(whole) * Fraction(2) ** self._exponent(0))
        return rounded

    def _exponent(self, k: int) -> int:
        return _DIGIT_BITS * (self.lowest + k) - _MIN_EXPONENT


def split_digits(numbers: Floats) -> Digits:
    """Split finite numbers into digits at fixed positions. There are as many positions as all numbers need together."""
    fractions, exponents = np.frexp(np.abs(numbers))
    mantissas = np.ldexp(fractions, 53).astype(np.int64)
    shifts = exponents.astype(np.int64) - 53 + _MIN_EXPONENT
    # Subnormal numbers have zeros below the lowest position.
    mantissas, shifts = mantissas >> np.maximum(-shifts, 0), np.maximum(shifts, 0)
    positions, inner_shifts = shifts // _DIGIT_BITS, shifts % _DIGIT_BITS
    used = positions[mantissas != 0]
    lowest = int(used.min()) if used.size else 0
    num_positions = (int(used.max()) - lowest if used.size else 0) + 3
    low = (mantissas & _DIGIT).astype(np.uint64) << inner_shifts.astype(np.uint64)
    high = (low >> np.uint64(_DIGIT_BITS)).astype(np.int64) + ((mantissas >> _DIGIT_BITS) << inner_shifts)
    signs = np.where(numbers < 0, -1, 1)
    digits = np.zeros((num_positions, numbers.size), np.int64)
    first, columns = np.clip(positions - lowest, 0, num_positions - 3), np.arange(numbers.size)
    digits[first, columns] = (low & np.uint64(_DIGIT)).astype(np.int64) * signs
    digits[first + 1, columns] = (high & _DIGIT) * signs
    digits[first + 2, columns] = (high >> _DIGIT_BITS) * signs
    return Digits(list(digits), lowest)


def _carried(sums: Sequence[Ints]) -> list[Ints]:
    """Carry digits over. Then all but the highest are from 0 to 2 ** 32 - 1, and each is exact as a float64."""
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


def add_exactly(parts: Sequence[float], value: float) -> list[float]:
    """Return a few floats whose exact sum is that of `parts` and `value` (Shewchuk 1997, grow-expansion)."""
    if not abs(value) < _LARGE:
        return [*parts, value]
    new_parts = []
    for part in parts:
        if not abs(part) < _LARGE:
            new_parts.append(part)
            continue
        if abs(value) < abs(part):
            value, part = part, value
        total = value + part
        if rounding_error := part - (total - value):
            new_parts.append(rounding_error)
        value = total
    return [*new_parts, value]
