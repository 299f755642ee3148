"""Declared aggregations of an event view: sums, counts, extremes, last values and distinct counts over moving windows.

These rules apply to the offline join (`offline/window_values.py`) and for the online state (`aggregation/tiles.py`).
For an entity and an instant t:

1. Rows with max(event_timestamp, created_timestamp) <= t are known. Other rows do not exist yet.
2. Rows of one entity with the same `event_id` are versions of one event. Among the known versions, only the one with
   the greatest (created_timestamp, ingest_seq) is used. So a correction may move an event to an earlier time. An event
   cannot move to another entity; write a tombstone for the old entity and a new row for the new one.
3. If the used version is a tombstone (`deleted`), the event is left out.
4. The remaining events with event_timestamp in (t - w, t] are aggregated. Nulls in the column are skipped:

   - `count` is the number of values that are not null; `count` of "*" is the number of events. Without events it is 0.
   - `sum` is int64 for whole numbers and float64 for fractions. Without values it is null, as in SQL.
   - `mean` is the sum divided by the count, float64. Without values it is null.
   - `min`, `max` and `last` have the column's dtype. Without values they are null. `last` is the value with the
     greatest (event_timestamp, created_timestamp, ingest_seq).
   - `distinct` is the number of different values: exact up to `EXACT_DISTINCT`, above that by HyperLogLog.

A sum of fractions is the exact sum of the values, rounded once. So it does not depend on the order of addition, and
offline and online sums are equal bit by bit. Zero is never negative. A sum outside float64 is infinite; a sum with
infinities of both signs is null.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any

from cluster.errors import DefinitionError, did_you_mean
from feature_jobs.store.definitions.limits import CENTURY, validate_span
from feature_jobs.store.types.dtypes import INTEGERS, NUMBERS, is_rich

ALL_EVENTS = "*"
"""Column name that stands for the event itself: `count` of it is the number of events, whatever their values are."""
EXACT_DISTINCT = 1024
"""Up to this number of different values, `distinct` is exact."""
_UNITS = (("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000))


class Function(enum.StrEnum):
    """The aggregation functions, with their properties."""

    SUM = "sum"
    COUNT = "count"
    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    LAST = "last"
    DISTINCT = "distinct"

    @property
    def needs_numbers(self) -> bool:
        """Whether the column must be numeric."""
        return self in (Function.SUM, Function.MEAN)

    @property
    def picks_value(self) -> bool:
        """Whether the result is one of the column's values, with its dtype and categories."""
        return self in (Function.MIN, Function.MAX, Function.LAST)

    def dtype(self, column_dtype: str) -> str:
        """Return the dtype of the result for a column of `column_dtype`."""
        match self:
            case Function.COUNT | Function.DISTINCT:
                return "int64"
            case Function.MEAN:
                return "float64"
            case Function.SUM:
                return "int64" if column_dtype in INTEGERS else "float64"
            case Function.MIN | Function.MAX | Function.LAST:
                return column_dtype


FUNCTIONS = tuple(function.value for function in Function)


@dataclass(frozen=True, slots=True)
class Aggregation:
    """One function of one column over some windows. Each window gives a feature, `<column>_<function>_<window>`."""

    column: str
    """The column's name, or "*" to count events."""
    function: str
    """One of `FUNCTIONS`."""
    _: KW_ONLY
    windows: Sequence[timedelta]
    """Lengths w of the windows (t - w, t]."""

    def __post_init__(self) -> None:
        owner = f"Aggregation('{self.column}', '{self.function}')"
        if self.function not in FUNCTIONS:
            raise DefinitionError(f"{owner}: unknown function.{did_you_mean(self.function, FUNCTIONS)}")
        if self.column == ALL_EVENTS and self.function != Function.COUNT:
            raise DefinitionError(f"{owner}: only count takes '*'. Name a column.")
        if isinstance(self.windows, timedelta):
            raise DefinitionError(f"{owner}: windows must be a list. Write windows=[timedelta(…)].")
        object.__setattr__(self, "windows", tuple(self.windows))
        if not self.windows:
            raise DefinitionError(f"{owner} has no window. Give windows=[timedelta(…)].")
        for window in self.windows:
            validate_span(f"{owner}: a window", window, longest=CENTURY)

    def definition(self) -> list[dict[str, Any]]:
        """Return the aggregation as the ledger records it: one entry per feature."""
        prefix = self.function if self.column == ALL_EVENTS else f"{self.column}_{self.function}"
        windows_us = [window // timedelta(microseconds=1) for window in self.windows]
        return [
            {
                "name": f"{prefix}_{_window_text(window_us)}",
                "column": self.column,
                "function": self.function,
                "window_us": window_us,
            }
            for window_us in windows_us
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One feature of an aggregated view."""

    name: str
    column: str
    """The aggregated column, or "*"."""
    function: str
    window_us: int
    """Length of the window in microseconds."""
    column_dtype: str
    """The column's dtype; int64 for "*"."""

    @property
    def dtype(self) -> str:
        """The feature's dtype."""
        return Function(self.function).dtype(self.column_dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSpec:
    """How the features of an aggregated view are computed from its events, as plain data."""

    event_id: str
    """The column that identifies an event."""
    event_id_dtype: str
    outputs: tuple[Output, ...]

    @property
    def columns(self) -> dict[str, str]:
        """The aggregated columns with their dtypes, without repetition, in order."""
        return {output.column: output.column_dtype for output in self.outputs if output.column != ALL_EVENTS}

    @property
    def table_columns(self) -> list[str]:
        """The columns of the feature table that the aggregations read."""
        return list(dict.fromkeys([self.event_id, *self.columns]))

    @property
    def longest_us(self) -> int:
        """Length of the longest window in microseconds."""
        return max(output.window_us for output in self.outputs)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WindowSpec:
        """Rebuild a spec from the dict that `dataclasses.asdict` made."""
        outputs = tuple(Output(**output) for output in data["outputs"])
        return cls(event_id=data["event_id"], event_id_dtype=data["event_id_dtype"], outputs=outputs)


def window_spec(
    event_id: str, aggregations: Iterable[Mapping[str, Any]], dtypes: Mapping[str, str]
) -> WindowSpec:
    """Build the spec of a view's aggregations.

    Args:
        event_id: The column that identifies an event.
        aggregations: The entries of `Aggregation.definition`.
        dtypes: The dtypes of the view's columns.

    Raises:
        DefinitionError: A column is unknown or does not fit its function, or two features have the same name.
    """
    outputs: dict[str, Output] = {}
    for entry in aggregations:
        column_dtype = _column_dtype(entry["column"], Function(entry["function"]), dtypes)
        output = Output(
            name=entry["name"],
            column=entry["column"],
            function=entry["function"],
            window_us=entry["window_us"],
            column_dtype=column_dtype,
        )
        if outputs.setdefault(output.name, output) is not output:
            raise DefinitionError(f"Two aggregations give the feature '{output.name}'. Remove one.")
    event_id_dtype = _column_dtype(event_id, Function.COUNT, dtypes)
    return WindowSpec(event_id=event_id, event_id_dtype=event_id_dtype, outputs=tuple(outputs.values()))


def _window_text(window_us: int) -> str:
    """Format a window for a feature's name: `7d`, `1h`, `90m`."""
    for unit, size in _UNITS:
        if window_us % size == 0:
            return f"{window_us // size}{unit}"
    return f"{window_us}us"


def _column_dtype(column: str, function: Function, dtypes: Mapping[str, str]) -> str:
    """Return the column's dtype after checking that the function accepts it."""
    if column == ALL_EVENTS:
        return "int64"
    if column not in dtypes:
        raise DefinitionError(f"Aggregated column '{column}' is unknown.{did_you_mean(column, dtypes)}")
    dtype = dtypes[column]
    if is_rich(dtype) and dtype != "date":
        raise DefinitionError(
            f"{function} of '{column}': windows take bools, numbers, text, times and dates, '{column}' is {dtype}. "
            "Compute such a column in the view's transform; count('*') counts events."
        )
    if function.needs_numbers and dtype not in NUMBERS:
        raise DefinitionError(f"{function} of '{column}' needs numbers, '{column}' is {dtype}.")
    return dtype
