"""Declarative checks of a view. Row checks are here; checks of whole batches are in `batch_checks.py`.

Checks are data, so a view's version and the ledger record what was checked. A null passes every check except `NotNull`,
as in SQL: whether a value may be null and which values are valid are separate decisions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError
from feature_jobs.store.definitions.limits import EXACT, validate_number
from feature_jobs.store.types.dtypes import NUMBERS, decimal_of

_BITS = {"int32": 31, "int64": 63}
"""Bits of an integer dtype without the sign bit."""


@dataclass(frozen=True, slots=True)
class Check(ABC):
    """A check of a view."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Join keys and features that the check reads."""

    def validate_dtype(self, dtype: str | None) -> None:  # noqa: B027 (most checks fit any column)
        """Raise DefinitionError if the check does not fit a column of this dtype. None means a join key."""

    def definition(self) -> dict[str, Any]:
        """Return the check as the ledger records it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"check": type(self).__name__} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
        }

    @classmethod
    def from_definition(cls, recorded: Mapping[str, Any]) -> Self:
        """Rebuild a check of this class from its `definition`."""
        return cls(**{name: value for name, value in recorded.items() if name != "check"})


@dataclass(frozen=True, slots=True)
class RowCheck(Check):
    """A check of single rows, by the value of one column."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    @property
    @abstractmethod
    def reason(self) -> str:
        """Why a row failed, as quarantine records it."""

    @abstractmethod
    def failing_mask(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return a non-null mask of the rows that fail."""


@dataclass(frozen=True, slots=True)
class NotNull(RowCheck):
    """The value must not be null."""

    @property
    def reason(self) -> str:
        return f"{self.column} is null"

    def failing_mask(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.is_null(column)


@dataclass(frozen=True, slots=True)
class Range(RowCheck):
    """The value must be between two bounds, both included. None means no bound."""

    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        if self.minimum is None and self.maximum is None:
            raise DefinitionError(f"Range('{self.column}') needs a minimum or a maximum.")
        for name in ("minimum", "maximum"):
            if getattr(self, name) is not None:
                validate_number(f"Range('{self.column}'): {name}", getattr(self, name))
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise DefinitionError(
                f"Range('{self.column}'): minimum {self.minimum} is above maximum {self.maximum}."
            )

    def validate_dtype(self, dtype: str | None) -> None:
        if dtype is not None and dtype not in NUMBERS and decimal_of(dtype) is None:
            raise DefinitionError(
                f"Range('{self.column}') needs a numeric column, '{self.column}' is {dtype}."
            )
        if dtype in _BITS and not self._holds_whole(_BITS[dtype]):
            raise DefinitionError(
                f"Range('{self.column}') can never hold: no {dtype} is within {self._bounds}. Every row would fail."
            )

    @property
    def reason(self) -> str:
        return f"{self.column} outside {self._bounds}"

    @property
    def _bounds(self) -> str:
        low = "" if self.minimum is None else f"{self.minimum:g}"
        high = "" if self.maximum is None else f"{self.maximum:g}"
        return f"{low}..{high}"

    def _holds_whole(self, bits: int) -> bool:
        """Return whether any whole number of `bits` bits and a sign can pass."""
        low, high = -(1 << bits), (1 << bits) - 1
        if self.minimum is not None:
            low = max(low, math.ceil(self.minimum))
        if self.maximum is not None:
            high = min(high, math.floor(self.maximum))
        return low <= high

    def failing_mask(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        if pa.types.is_decimal(column.type):
            return self._decimals_failing(column)
        fails = pc.equal(pc.is_null(column), None)
        if self.minimum is not None:
            fails = pc.or_kleene(fails, pc.less(column, self.minimum))
        if self.maximum is not None:
            fails = pc.or_kleene(fails, pc.greater(column, self.maximum))
        return pc.fill_null(fails, False)

    def _decimals_failing(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Compare as decimals. As a float, a value very close to a bound could become equal to the bound."""
        low, high = (None if bound is None else Decimal(str(bound)) for bound in (self.minimum, self.maximum))
        mask = [
            value is not None and ((low is not None and value < low) or (high is not None and value > high))
            for value in column.to_pylist()
        ]
        return pa.chunked_array([pa.array(mask, pa.bool_())])


@dataclass(frozen=True, slots=True)
class Allowed(RowCheck):
    """The value must be one of the listed values."""

    values: Sequence[str | int | bool] = ()

    def __post_init__(self) -> None:
        if isinstance(self.values, str):
            raise DefinitionError(f"Allowed('{self.column}'): values must be a list, got '{self.values}'.")
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            raise DefinitionError(f"Allowed('{self.column}') needs values.")
        if len({type(value) for value in self.values}) > 1:
            raise DefinitionError(
                f"Allowed('{self.column}'): the values {list(self.values)} are of several types."
            )

    def validate_dtype(self, dtype: str | None) -> None:
        kind = {"string": str, "bool": bool, "int32": int, "int64": int}.get(dtype or "")
        if dtype is not None and not all(type(value) is kind for value in self.values):
            raise DefinitionError(
                f"Allowed('{self.column}'): the values {list(self.values)} do not fit dtype {dtype}."
            )
        greatest = min(EXACT, (1 << _BITS.get(dtype or "int64", 63)) - 1)
        for value in self.values:
            if isinstance(value, int) and abs(value) > greatest:
                raise DefinitionError(
                    f"Allowed('{self.column}'): {value} is out of range for {dtype or 'int64'}."
                )

    @property
    def reason(self) -> str:
        return f"{self.column} is none of the allowed values"

    def failing_mask(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        known = pc.is_in(column, value_set=pa.array(self.values, type=column.type))
        return pc.and_(pc.invert(known), pc.is_valid(column))


@dataclass(frozen=True, slots=True)
class Pattern(RowCheck):
    """The whole text must match a regular expression (RE2, without look-around and back references)."""

    pattern: str = ""

    def __post_init__(self) -> None:
        if not self.pattern:
            raise DefinitionError(f"Pattern('{self.column}') needs a pattern.")
        # The pattern must also be valid alone. Otherwise a ")" in it could close the group that `_whole` adds.
        for regex in (self.pattern, self._whole):
            try:
                pc.match_substring_regex(pa.array([""]), regex)
            except pa.ArrowInvalid as error:
                raise DefinitionError(
                    f"Pattern('{self.column}'): {self.pattern!r} is not a valid RE2 expression: {error}."
                ) from error

    @property
    def _whole(self) -> str:
        return rf"\A(?:{self.pattern})\z"

    def validate_dtype(self, dtype: str | None) -> None:
        if dtype not in (None, "string"):
            raise DefinitionError(
                f"Pattern('{self.column}') needs a column of text, '{self.column}' is {dtype}."
            )

    @property
    def reason(self) -> str:
        return f"{self.column} does not match {self.pattern}"

    def failing_mask(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.fill_null(pc.invert(pc.match_substring_regex(column, self._whole)), False)
