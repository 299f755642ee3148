"""Which plain values an Arrow type takes: a request is refused by it, and the log is read by it.

A type is never inferred from the values themselves. One 1.5 among whole numbers would turn all of them into floats,
and 2^53 + 1 into another number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from cluster.runtime.signature import NUMERIC

GREATEST = 2**63 - 1
"""Of a whole number, and the least is its negative: logs know no number beyond 64 bits with a sign."""
EXACT_IN_FLOAT = 2**53
"""A float holds each whole number up to here; a larger one may stand for several."""


class NotOfType(ValueError):
    """A value that the type does not take."""

    def __init__(self, value: Any, wanted: str) -> None:
        super().__init__(wanted)
        self.value = value
        self.wanted = wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueType:
    """What values of one Arrow type are as JSON has them; null is always one."""

    base: type
    """bool, int, float or str; an int is a float, too."""
    wanted: str
    """In words, for a message."""
    least: int = 1
    greatest: int = 0
    """Of a whole number; a type that takes no numbers has none between."""

    @property
    def types(self) -> frozenset[type]:
        """What values may be."""
        return _TYPES[self.base]

    def fit(self, values: list[Any]) -> list[Any]:
        """The same values, a whole number as an int however it is written (50.0).

        Raises:
            NotOfType: for the first that is none.
        """
        if len(values) == 1:  # most requests are for one entity
            value = values[0]
            kind = type(value)
            if kind is float:
                if self.base is float and -math.inf < value < math.inf:
                    return values
            elif kind is int:
                if self.least <= value <= self.greatest:
                    return values
            elif kind is self.base or value is None:
                return values
        found = set(map(type, values))
        if not found <= self.types:
            return [self._one(value) for value in values]
        if self.greatest and not found <= _EMPTY:
            numbers = [value for value in values if value is not None] if NoneType in found else values
            # Least, greatest and sum of all are found sooner than each is looked at.
            fits = float not in found or math.isfinite(sum(numbers))
            if int in found:
                fits = fits and self.least <= min(numbers) and max(numbers) <= self.greatest
            if not fits:
                self._check_each(numbers)
        return values

    def _check_each(self, numbers: Sequence[Any]) -> None:
        for number in numbers:
            if isinstance(number, float):
                if not math.isfinite(number):
                    raise NotOfType(number, "finite")
            elif not self.least <= number <= self.greatest:
                raise NotOfType(number, f"{self.wanted} from {self.least} to {self.greatest}")

    def fit_what_fits(self, values: list[Any]) -> tuple[list[Any], int]:
        """The values with a null for each that is none of the type, and how many these are."""
        try:
            return self.fit(values), 0
        except NotOfType:
            fitted = [self._or_null(value) for value in values]
            return fitted, sum(
                new is None and old is not None for new, old in zip(fitted, values, strict=True)
            )

    def _one(self, value: Any) -> Any:
        if (
            self.base is int
            and isinstance(value, float)
            and value.is_integer()
            and abs(value) <= EXACT_IN_FLOAT
        ):
            value = int(value)
        if type(value) not in self.types:
            raise NotOfType(value, self.wanted)
        return self.fit([value])[0]

    def _or_null(self, value: Any) -> Any:
        try:
            return self._one(value)
        except NotOfType:
            return None


_EMPTY = frozenset({NoneType})
_TYPES: dict[type, frozenset[type]] = {
    bool: frozenset({bool, NoneType}),
    int: frozenset({int, NoneType}),
    float: frozenset({int, float, NoneType}),
    str: frozenset({str, NoneType}),
}


@functools.cache
def value_type(dtype: str) -> ValueType | None:
    """Of an Arrow type by name, as signatures and feature views write it; None for a type that is not known here."""
    if dtype == "bool":
        return ValueType(base=bool, wanted="true or false")
    if dtype in ("string", "large_string"):
        return ValueType(base=str, wanted="text")
    if dtype not in NUMERIC:
        return None
    if not dtype.startswith(("int", "uint")):
        return ValueType(base=float, wanted="a number", least=-GREATEST, greatest=GREATEST)
    unsigned, bits = dtype.startswith("u"), int(dtype.lstrip("uint"))
    greatest = min(2 ** (bits - (not unsigned)) - 1, GREATEST)
    least = 0 if unsigned else max(-(2 ** (bits - 1)), -GREATEST)
    return ValueType(base=int, wanted=f"a whole number ({dtype})", least=least, greatest=greatest)
