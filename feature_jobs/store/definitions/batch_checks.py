"""Rules for whole batches, and rules for rows that compare a row with its batch or with the last good batch.

`Unique` and `Outlier` send rows to quarantine. `NullShare`, `Freshness`, `RowCount` and `Drift` refuse a whole batch.
If there is no last good batch, rules that compare with it pass. So they accept every first batch.
"""

from __future__ import annotations

import enum
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError
from feature_jobs.store.definitions.checks import Check
from feature_jobs.store.definitions.limits import validate_number, validate_span
from feature_jobs.store.types.batch_profile import Distribution, Profile
from feature_jobs.store.types.dtypes import NUMBERS, is_rich, list_of
from feature_jobs.store.types.schema import CREATED, EVENT

TIMES = (EVENT, CREATED)
_MICROSECOND = timedelta(microseconds=1)
_NOISE_SIGMAS = 3.09
"""One-sided normal quantile for 1 in 1,000: the share of batches that is refused by chance."""


class Keep(enum.StrEnum):
    """Which of several equal rows is stored."""

    none = "none"
    """All equal rows go to quarantine, because it is not known which one is right."""
    first = "first"
    """The first row in the order of the source."""


@dataclass(frozen=True, slots=True)
class Unique(Check):
    """No two good rows of a batch may have equal values in all of some columns. A null is not equal to anything.

    The columns are join keys, features, `event_timestamp` or `created_timestamp`. Rows that fail another rule are
    ignored. The check needs these columns of the whole batch in one process.
    """

    of: Sequence[str]
    keep: Keep = Keep.none

    def __post_init__(self) -> None:
        if isinstance(self.of, str) or not self.of:
            raise DefinitionError(f"Unique needs a list of columns, got {self.of!r}.")
        object.__setattr__(self, "of", tuple(self.of))
        if duplicates := [name for name in self.of if list(self.of).count(name) > 1]:
            raise DefinitionError(f"Unique names the column '{duplicates[0]}' twice.")
        object.__setattr__(self, "keep", Keep(self.keep))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in self.of if name not in TIMES)

    def validate_dtype(self, dtype: str | None) -> None:
        if dtype is not None and list_of(dtype) is not None:
            raise DefinitionError(f"Unique({list(self.of)}) cannot compare lists, and one column is {dtype}.")

    def definition(self) -> dict[str, Any]:
        return {"check": "Unique", "of": list(self.of), "keep": self.keep.value}

    @property
    def reason(self) -> str:
        """The reason that a failing row gets. Quarantine files store it, and a replay compares it with this text."""
        return f"{', '.join(self.of)} not unique in the batch"

    def failing_mask(self, rows: pa.Table) -> pa.Array:
        """Return one bool per row: true if the row fails.

        Args:
            rows: the good rows of a batch in the order of the source, with the columns in `of`.
        """
        import polars as pl  # a command that only reads definitions does not need it

        frame = pl.DataFrame(pl.from_arrow(rows.select(list(self.of))))
        has_no_null = ~pl.any_horizontal(pl.col(name).is_null() for name in self.of)
        # Counting over groups takes a third of the time of `is_duplicated` on a struct.
        is_repeated = pl.len().over(self.of) > 1
        fails = is_repeated if self.keep is Keep.none else ~pl.struct(self.of).is_first_distinct()
        return frame.select((has_no_null & fails).alias("fails"))["fails"].to_arrow()


@dataclass(frozen=True, slots=True)
class Outlier(Check):
    """A value must not be far outside the quartiles of the last good batch.

    The limits are Tukey's fences (Exploratory Data Analysis, 1977): the first quartile minus `fences` interquartile
    ranges, and the third quartile plus as many. Tukey calls values beyond 3 ranges "far out". If the first and third
    quartile are equal, the range is zero, and every value passes.
    """

    column: str
    fences: float = 3.0

    def __post_init__(self) -> None:
        validate_number(f"Outlier('{self.column}'): fences", self.fences)
        if self.fences <= 0:
            raise DefinitionError(f"Outlier('{self.column}'): fences must be positive, got {self.fences}.")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def validate_dtype(self, dtype: str | None) -> None:
        if dtype not in NUMBERS:
            raise DefinitionError(f"Outlier('{self.column}') needs a numeric feature.")

    @property
    def reason(self) -> str:
        """The reason that a failing row gets."""
        return f"{self.column} more than {self.fences:g} interquartile ranges outside the last good batch"

    def failing_mask(self, column: pa.ChunkedArray, baseline: Profile | None) -> pa.ChunkedArray:
        """Return one non-null bool per row: true if the row fails."""
        previous = None if baseline is None else baseline.distributions.get(self.column)
        if previous is None or previous.quartiles is None or previous.quartiles[0] == previous.quartiles[2]:
            return pc.and_(pc.is_null(column), pc.is_valid(column))  # false for every row
        low, _, high = previous.quartiles
        slack = self.fences * (high - low)
        beyond = pc.or_(pc.less(column, low - slack), pc.greater(column, high + slack))
        return pc.fill_null(beyond, False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A batch rule that failed, and by how much. Events store it with these field names."""

    rule: str
    value: float
    threshold: float
    said: str
    """The message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The input of batch rules."""

    batch: Profile
    baseline: Profile | None
    """Profile of the last good batch."""
    counts: Mapping[str, Sequence[int]]
    """By feature: this batch's values, counted in the bins of the last good batch."""
    now: datetime


@dataclass(frozen=True, slots=True)
class BatchCheck(Check):
    """A rule that a whole batch passes or fails."""

    @abstractmethod
    def finding(self, facts: Facts) -> Finding | None:
        """Return how the batch fails the rule, or None if it passes."""


@dataclass(frozen=True, slots=True)
class NullShare(BatchCheck):
    """Limit the share of null values in a feature. All rows are included, also those that go to quarantine."""

    column: str
    maximum: float

    def __post_init__(self) -> None:
        validate_number(f"NullShare('{self.column}'): maximum", self.maximum)
        if not 0 <= self.maximum < 1:
            raise DefinitionError(
                f"NullShare('{self.column}'): maximum must be at least 0 and below 1, got {self.maximum}."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def validate_dtype(self, dtype: str | None) -> None:
        _require_feature("NullShare", self.column, dtype)

    def finding(self, facts: Facts) -> Finding | None:
        share = facts.batch.nulls[self.column] / max(facts.batch.rows_in, 1)
        if share <= self.maximum:
            return None
        message = f"{share:.1%} of '{self.column}' are null, at most {self.maximum:.1%} may be"
        return Finding(rule=f"NullShare({self.column})", value=share, threshold=self.maximum, said=message)


@dataclass(frozen=True, slots=True)
class Freshness(BatchCheck):
    """At ingestion, the newest event time of a batch must not be older than `maximum_age`."""

    maximum_age: timedelta

    def __post_init__(self) -> None:
        validate_span("Freshness: maximum_age", self.maximum_age)

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def definition(self) -> dict[str, Any]:
        return {"check": "Freshness", "maximum_age_s": self.maximum_age.total_seconds()}

    @classmethod
    def from_definition(cls, recorded: Mapping[str, Any]) -> Self:
        return cls(timedelta(seconds=recorded["maximum_age_s"]))

    def finding(self, facts: Facts) -> Finding | None:
        newest = facts.batch.newest_event_us
        if newest is None:
            return None
        age = facts.now - datetime.fromtimestamp(0, facts.now.tzinfo) - newest * _MICROSECOND
        if age <= self.maximum_age:
            return None
        return Finding(
            rule="Freshness",
            value=age.total_seconds(),
            threshold=self.maximum_age.total_seconds(),
            said=f"the newest event is {age} old, at most {self.maximum_age} is allowed",
        )


@dataclass(frozen=True, slots=True)
class RowCount(BatchCheck):
    """A batch may have at most `factor` times the rows of the last good batch, and at least 1/`factor` of them."""

    factor: float

    def __post_init__(self) -> None:
        validate_number("RowCount: factor", self.factor)
        if self.factor <= 1:
            raise DefinitionError(f"RowCount: factor must be above 1, got {self.factor}.")

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def finding(self, facts: Facts) -> Finding | None:
        if facts.baseline is None:
            return None
        rows, previous_rows = facts.batch.rows_in, facts.baseline.rows_in
        if previous_rows / self.factor <= rows <= previous_rows * self.factor:
            return None
        message = (
            f"{rows} rows after {previous_rows} in the last good batch, more than a factor of {self.factor:g}"
        )
        return Finding(rule="RowCount", value=rows / previous_rows, threshold=self.factor, said=message)


@dataclass(frozen=True, slots=True)
class Drift(BatchCheck):
    """A feature's distribution must not differ from that of the last good batch by more than `threshold`.

    The measure is the population stability index (`stability_index`) over the last good batch's deciles or most
    frequent categories, without nulls. The index that small batches reach by chance is added to the threshold
    (`chance`).
    """

    column: str
    threshold: float = 0.2

    def __post_init__(self) -> None:
        validate_number(f"Drift('{self.column}'): threshold", self.threshold)
        if self.threshold <= 0:
            raise DefinitionError(
                f"Drift('{self.column}'): threshold must be positive, got {self.threshold}."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def validate_dtype(self, dtype: str | None) -> None:
        _require_feature("Drift", self.column, dtype)
        if dtype in ("timestamp", "date"):
            raise DefinitionError(f"Drift('{self.column}'): a time changes with every batch. Use Freshness.")
        if dtype is not None and is_rich(dtype):
            raise DefinitionError(
                f"Drift('{self.column}') needs numbers, text or bools, '{self.column}' is {dtype}."
            )

    def finding(self, facts: Facts) -> Finding | None:
        before = facts.baseline.distributions.get(self.column) if facts.baseline is not None else None
        after = facts.counts.get(self.column)
        if before is None or after is None or not sum(after):
            return None
        index = stability_index(before.counts, after)
        allowed = self.threshold + chance(before, after)
        if index <= allowed:
            return None
        message = (
            f"the population stability index of '{self.column}' against the last good batch is {index:.3f}, "
            f"at most {allowed:.3f} is allowed"
        )
        return Finding(rule=f"Drift({self.column})", value=index, threshold=allowed, said=message)


def stability_index(before: Sequence[int], after: Sequence[int]) -> float:
    """Return the population stability index: the sum of (q - p) ln(q / p) over shares p before and q after.

    It is Jeffreys' divergence (Kullback and Leibler 1951, eq. 2.6). Half a value is added to each bin, so that an empty
    bin does not give infinity.
    """
    p, q = _shares(before), _shares(after)
    return math.fsum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))


def chance(before: Distribution, after: Sequence[int]) -> float:
    """Return the stability index that two samples of one distribution exceed about once in 1,000 times.

    The index is close to (1/n + 1/m) times a chi-square variable with (number of bins - 1) degrees of freedom (Yurdakul
    and Naranjo, Statistical properties of the population stability index, 2020). A normal approximation is used here.
    """
    degrees = len(after) - 1
    scale = 1 / sum(before.counts) + 1 / sum(after)
    return scale * (degrees + _NOISE_SIGMAS * math.sqrt(2 * degrees))


def collect_findings(checks: Sequence[Check], facts: Facts) -> list[Finding]:
    """Return the findings of all batch rules, in the order of the rules."""
    results = [check.finding(facts) for check in checks if isinstance(check, BatchCheck)]
    return [finding for finding in results if finding is not None]


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + len(counts) / 2
    return [(count + 0.5) / total for count in counts]


def _require_feature(rule: str, column: str, dtype: str | None) -> None:
    if dtype is None:
        raise DefinitionError(f"{rule}('{column}') is for features, '{column}' is a join key.")
