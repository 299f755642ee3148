"""Check and convert JSON values for an Arrow type, when a request is validated and when the log is read.

A type is never inferred from the values. A single 1.5 among integers would turn all integers into floats, and 2^53 + 1
into another number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from cluster.runtime.signature import NUMERIC

MAX_INTEGER = 2**63 - 1
"""Largest integer; the smallest is its negative. Logs store integers with a sign and 64 bits."""
EXACT_IN_FLOAT = 2**53
"""A float represents every integer up to this number exactly. A larger float can stand for several integers."""


class WrongValueType(ValueError):
    """A value does not belong to a type."""

    def __init__(self, value: Any, expected: str) -> None:
        super().__init__(expected)
        self.value = value
        self.expected = expected


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueType:
    """JSON values of one Arrow type. Null belongs to every type."""

    base: type
    """bool, int, float or str. An int also belongs to float."""
    expected: str
    """Description of the type, for error messages."""
    least: int = 1
    greatest: int = 0
    """Range of integers. For a type without numbers, the range is empty."""

    @property
    def types(self) -> frozenset[type]:
        """Python types that values may have."""
        return _TYPES[self.base]

    def convert(self, values: list[Any]) -> list[Any]:
        """Return the values. For an integer type, floats such as 50.0 become ints.

        Raises:
            WrongValueType: A value does not belong to the type. The error contains the first such value.
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
        value_types = set(map(type, values))
        if not value_types <= self.types:
            return [self._convert(value) for value in values]
        if self.greatest and not value_types <= _NULL:
            numbers = [value for value in values if value is not None] if NoneType in value_types else values
            # Minimum, maximum and sum are faster than a check of each number.
            fits = float not in value_types or math.isfinite(sum(numbers))
            if int in value_types:
                fits = fits and self.least <= min(numbers) and max(numbers) <= self.greatest
            if not fits:
                self._check_each(numbers)
        return values

    def _check_each(self, numbers: Sequence[Any]) -> None:
        for number in numbers:
            if isinstance(number, float):
                if not math.isfinite(number):
                    raise WrongValueType(number, "finite")
            elif not self.least <= number <= self.greatest:
                raise WrongValueType(number, f"{self.expected} from {self.least} to {self.greatest}")

    def convert_or_null(self, values: list[Any]) -> tuple[list[Any], int]:
        """Return the values, with None for each value of another type, and the number of such values."""
        try:
            return self.convert(values), 0
        except WrongValueType:
            converted = [self._convert_or_null(value) for value in values]
            return converted, sum(
                new is None and old is not None for new, old in zip(converted, values, strict=True)
            )

    def _convert(self, value: Any) -> Any:
        if (
            self.base is int
            and isinstance(value, float)
            and value.is_integer()
            and abs(value) <= EXACT_IN_FLOAT
        ):
            value = int(value)
        if type(value) not in self.types:
            raise WrongValueType(value, self.expected)
        return self.convert([value])[0]

    def _convert_or_null(self, value: Any) -> Any:
        try:
            return self._convert(value)
        except WrongValueType:
            return None


_NULL = frozenset({NoneType})
_TYPES: dict[type, frozenset[type]] = {
    bool: frozenset({bool, NoneType}),
    int: frozenset({int, NoneType}),
    float: frozenset({int, float, NoneType}),
    str: frozenset({str, NoneType}),
}


@functools.cache
def value_type(dtype: str) -> ValueType | None:
    """Return the `ValueType` for the name of an Arrow type, as in signatures and views, or None if it is not known."""
    if dtype == "bool":
        return ValueType(base=bool, expected="true or false")
    if dtype in ("string", "large_string"):
        return ValueType(base=str, expected="text")
    if dtype not in NUMERIC:
        return None
    if not dtype.startswith(("int", "uint")):
        return ValueType(base=float, expected="a number", least=-MAX_INTEGER, greatest=MAX_INTEGER)
    unsigned, bits = dtype.startswith("u"), int(dtype.lstrip("uint"))
    greatest = min(2 ** (bits - (not unsigned)) - 1, MAX_INTEGER)
    least = 0 if unsigned else max(-(2 ** (bits - 1)), -MAX_INTEGER)
    return ValueType(base=int, expected=f"a whole number ({dtype})", least=least, greatest=greatest)
