"""What a view over events declares: sums, counts, extremes, last values and distinct counts over moving windows.

This is the meaning that the offline join (`windows`) and the online state (`tiles`) share. For an entity and an
instant t:

1. Rows with v = max(event_timestamp, created_timestamp) <= t are known; the others do not exist yet.
2. Rows of one entity with the same `event_id` are versions of one event. The version with the greatest
   (created_timestamp, ingest_seq) among the known ones counts and the others do not, so a correction may move an event
   to an earlier time. An event does not change its entity: that is a tombstone there and a new row here.
3. An event whose counting version is a tombstone (`deleted`) is gone.
4. Of the rest, those with event_timestamp in (t - w, t] are aggregated. Nulls in the column are skipped:

   - `count` counts what is not null, `count` of "*" the events; nothing gives 0.
   - `sum` of whole numbers is int64, of fractions float64; nothing gives null, as in SQL.
   - `mean` is the sum divided by the count, float64; nothing gives null.
   - `min`, `max` and `last` have the column's dtype; nothing gives null. `last` is the value with the greatest
     (event_timestamp, created_timestamp, ingest_seq).
   - `distinct` counts different values: exactly up to `EXACT_DISTINCT`, above that by HyperLogLog.

Sums of fractions are the exact sum of the values, rounded once, so they do not depend on the order of addition and are
the same offline and online, bit by bit. A zero is never negative. A sum beyond float64 is infinite; one with infinities
of both signs is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any

from cluster.errors import DefinitionError, did_you_mean
from feature_jobs.store.definitions.limits import CENTURY as LONGEST
from feature_jobs.store.definitions.limits import check_span
from feature_jobs.store.types.dtypes import INTEGERS, NUMBERS, is_rich

FUNCTIONS = ("sum", "count", "mean", "min", "max", "last", "distinct")
EVERY = "*"
"""Stands for the event itself, to count rows whatever their values are."""
EXACT_DISTINCT = 1024
"""Up to here `distinct` is exact."""
_UNITS = (("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000))


@dataclass(frozen=True, slots=True)
class Aggregation:
    """One function of one column over some windows; each gives a feature, `<column>_<function>_<window>`."""

    column: str
    function: str
    _: KW_ONLY
    windows: Sequence[timedelta]
    """Lengths w of the windows (t - w, t]."""

    def __post_init__(self) -> None:
        what = f"Aggregation('{self.column}', '{self.function}')"
        if self.function not in FUNCTIONS:
            raise DefinitionError(f"{what}: unknown function.{did_you_mean(self.function, FUNCTIONS)}")
        if self.column == EVERY and self.function != "count":
            raise DefinitionError(f"{what}: only count takes '*'. Name a column.")
        if isinstance(self.windows, timedelta):
            raise DefinitionError(f"{what}: windows must be a list. Write windows=[timedelta(…)].")
        object.__setattr__(self, "windows", tuple(self.windows))
        if not self.windows:
            raise DefinitionError(f"{what} has no window. Give windows=[timedelta(…)].")
        for window in self.windows:
            check_span(f"{what}: a window", window, longest=LONGEST)

    def definition(self) -> list[dict[str, Any]]:
        """What the aggregation gives, as it stands in the ledger: one entry per feature."""
        start = self.function if self.column == EVERY else f"{self.column}_{self.function}"
        spans = [window // timedelta(microseconds=1) for window in self.windows]
        return [
            {
                "name": f"{start}_{window_text(window_us)}",
                "column": self.column,
                "function": self.function,
                "window_us": window_us,
            }
            for window_us in spans
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One feature of an aggregated view."""

    name: str
    column: str
    """The column it is made of, or "*"."""
    function: str
    window_us: int
    column_dtype: str
    """Of the column; int64 for "*"."""

    @property
    def dtype(self) -> str:
        """Of the feature."""
        match self.function:
            case "count" | "distinct":
                return "int64"
            case "mean":
                return "float64"
            case "sum":
                return "int64" if self.column_dtype in INTEGERS else "float64"
            case _:
                return self.column_dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowSpec:
    """How an aggregated view's features are made of its events, as plain data."""

    event_id: str
    """The column that identifies an event."""
    event_id_dtype: str
    outputs: tuple[Output, ...]

    @property
    def columns(self) -> dict[str, str]:
        """The aggregated columns and their dtypes, each once, in order."""
        return {output.column: output.column_dtype for output in self.outputs if output.column != EVERY}

    @property
    def read(self) -> list[str]:
        """The columns of the feature table that are needed."""
        return list(dict.fromkeys([self.event_id, *self.columns]))

    @property
    def longest_us(self) -> int:
        """The longest window."""
        return max(output.window_us for output in self.outputs)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WindowSpec:
        """The spec that `dataclasses.asdict` gave."""
        outputs = tuple(Output(**output) for output in data["outputs"])
        return cls(event_id=data["event_id"], event_id_dtype=data["event_id_dtype"], outputs=outputs)


def window_spec(
    event_id: str, aggregations: Iterable[Mapping[str, Any]], dtypes: Mapping[str, str]
) -> WindowSpec:
    """The outputs of declared aggregations.

    Args:
        event_id: the column that identifies an event.
        aggregations: as `Aggregation.definition` gives them.
        dtypes: of the view's columns.

    Raises:
        DefinitionError: a column is unknown or does not fit its function, or two outputs have one name.
    """
    outputs: dict[str, Output] = {}
    for one in aggregations:
        dtype = _dtype(one["column"], one["function"], dtypes)
        output = Output(
            name=one["name"],
            column=one["column"],
            function=one["function"],
            window_us=one["window_us"],
            column_dtype=dtype,
        )
        if outputs.setdefault(output.name, output) is not output:
            raise DefinitionError(f"Two aggregations give the feature '{output.name}'. Remove one.")
    return WindowSpec(
        event_id=event_id, event_id_dtype=_dtype(event_id, "count", dtypes), outputs=tuple(outputs.values())
    )


def window_text(window_us: int) -> str:
    """A window as names have it: `7d`, `1h`, `90m`."""
    for unit, size in _UNITS:
        if window_us % size == 0:
            return f"{window_us // size}{unit}"
    return f"{window_us}us"


def _dtype(column: str, function: str, dtypes: Mapping[str, str]) -> str:
    if column == EVERY:
        return "int64"
    if column not in dtypes:
        raise DefinitionError(f"Aggregated column '{column}' is unknown.{did_you_mean(column, dtypes)}")
    dtype = dtypes[column]
    if is_rich(dtype) and dtype != "date":
        raise DefinitionError(
            f"{function} of '{column}': windows take bools, numbers, text, times and dates, '{column}' is {dtype}. "
            "Make such a column in the view's transform; count('*') counts events."
        )
    if function in ("sum", "mean") and dtype not in NUMBERS:
        raise DefinitionError(f"{function} of '{column}' needs numbers, '{column}' is {dtype}.")
    return dtype
