"""Compute a batch's profile: the statistics with which the next batch is compared.

There are two passes over a batch's blocks. In both, the results of the blocks are added up. The first pass gives counts
and a sketch of each feature, and bins are chosen from the sketches. The second pass counts the values in each bin
exactly.

The numbers of nulls include rows in quarantine, because a broken source is often seen there first. Distributions
describe only good rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.store.definitions.views import Field
from feature_jobs.store.types.batch_profile import Distribution, Profile
from feature_jobs.store.types.dtypes import is_rich
from feature_jobs.store.types.schema import DELETED, EVENT

Numbers = npt.NDArray[np.float64]

NUM_BINS = 10
SKETCH_POINTS = 257
"""Number of order statistics in a sketch. A cut point's rank is wrong by at most 1/256 of the rows, and by 1/256 more
for each time that sketches were merged."""
MAX_CATEGORIES = 50
MAX_COUNTED = 10_000
"""Maximum number of distinct categories in a sketch."""


class OrderStatistics(NamedTuple):
    """Evenly spaced order statistics of a block's numbers."""

    points: Numbers
    num_values: int
    """How many values the points represent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sketch:
    """The result of the first pass over one block or several."""

    rows_in: int
    rows: int
    nulls: dict[str, int]
    newest_event_us: int | None
    numbers: dict[str, OrderStatistics]
    categories: dict[str, Counter[Any]]


class _Totals(NamedTuple):
    """What a batch's sketch and its profile have in common."""

    rows_in: int
    rows: int
    nulls: dict[str, int]
    newest_event_us: int | None


def sketch(block: pa.Table, good: pa.Table, fields: Sequence[Field]) -> Sketch:
    """Run the first pass over a validated block and its good rows. A tombstone's nulls are not counted."""
    alive = block.filter(pc.invert(block[DELETED])) if DELETED in block.column_names else block
    newest = pc.max(good[EVENT]).cast(pa.int64()).as_py()
    return Sketch(
        rows_in=block.num_rows,
        rows=good.num_rows,
        nulls={field.name: alive[field.name].null_count for field in fields},
        newest_event_us=newest,
        numbers={
            field.name: _order_statistics(_numbers(good[field.name]))
            for field in fields
            if not (is_categorical(field) or is_rich(field.dtype))
        },
        categories={
            field.name: _most_frequent(good[field.name]) for field in fields if is_categorical(field)
        },
    )


def merge(sketches: Sequence[Sketch]) -> Sketch:
    """Merge the sketches of some blocks into one of the same size."""
    return Sketch(
        **_add_rows(sketches)._asdict(),
        numbers={
            name: _merge_order_statistics([block.numbers[name] for block in sketches])
            for name in sketches[0].numbers
        },
        categories={
            name: Counter(dict(_add_categories(sketches, name).most_common(MAX_COUNTED)))
            for name in sketches[0].categories
        },
    )


def choose_bins(sketches: Sequence[Sketch]) -> dict[str, Distribution]:
    """Choose cut points and categories for a batch from its sketches. The distributions' counts are still empty."""
    chosen: dict[str, Distribution] = {}
    for name in sketches[0].numbers if sketches else ():
        quantiles = _quantile_function([block.numbers[name] for block in sketches])
        if quantiles is not None:
            inner = quantiles(np.arange(1, NUM_BINS) / NUM_BINS)
            quartiles = [float(value) for value in quantiles(np.array([0.25, 0.5, 0.75]))]
            chosen[name] = Distribution(counts=[], edges=np.unique(inner).tolist(), quartiles=quartiles)
    for name in sketches[0].categories if sketches else ():
        ranked = sorted(_add_categories(sketches, name).items(), key=lambda item: (-item[1], str(item[0])))
        if ranked:
            chosen[name] = Distribution(counts=[], categories=[value for value, _ in ranked[:MAX_CATEGORIES]])
    return chosen


def count(good: pa.Table, chosen: Mapping[str, Distribution]) -> dict[str, list[int]]:
    """Run the second pass: count the values of a block's good rows in each bin. Missing columns are skipped."""
    columns = set(good.column_names)
    return {
        name: _count(good[name], distribution)
        for name, distribution in chosen.items()
        if name in columns and _can_count(good[name].type, distribution)
    }


def profile(
    sketches: Sequence[Sketch],
    chosen: Mapping[str, Distribution],
    counted: Iterable[Mapping[str, Sequence[int]]],
) -> Profile:
    """Build a batch's profile from the results of both passes over its blocks."""
    totals = add_counts(counted)
    return Profile(
        **_add_rows(sketches)._asdict(),
        distributions={
            name: Distribution(
                counts=totals[name],
                edges=distribution.edges,
                categories=distribution.categories,
                quartiles=distribution.quartiles,
            )
            for name, distribution in chosen.items()
            if name in totals
        },
    )


def add_counts(counted: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """Add up the counts of several blocks that have the same bins."""
    totals: dict[str, list[int]] = {}
    for block in counted:
        for name, counts in block.items():
            total = totals.get(name, [0] * len(counts))
            totals[name] = [first + second for first, second in zip(total, counts, strict=True)]
    return totals


def _add_rows(sketches: Sequence[Sketch]) -> _Totals:
    nulls: Counter[str] = Counter()
    for block in sketches:
        nulls.update(block.nulls)
    times = [block.newest_event_us for block in sketches if block.newest_event_us is not None]
    return _Totals(
        rows_in=sum(block.rows_in for block in sketches),
        rows=sum(block.rows for block in sketches),
        nulls=dict(nulls),
        newest_event_us=max(times, default=None),
    )


def is_categorical(field: Field) -> bool:
    """Return True if a feature is counted by value, and not between cut points."""
    return field.categorical or field.dtype in ("string", "bool")


def _numbers(column: pa.ChunkedArray) -> Numbers:
    values = column.drop_null()
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.int64())
    return np.asarray(values.to_numpy(), dtype=np.float64)


def _order_statistics(values: Numbers) -> OrderStatistics:
    ordered = np.sort(values)
    if len(ordered) > SKETCH_POINTS:
        ordered = ordered[np.linspace(0, len(ordered) - 1, SKETCH_POINTS).round().astype(np.int64)]
    return OrderStatistics(ordered, len(values))


def _merge_order_statistics(parts: Sequence[OrderStatistics]) -> OrderStatistics:
    num_values = sum(part.num_values for part in parts)
    quantiles = _quantile_function(parts)
    if quantiles is None or num_values <= SKETCH_POINTS:
        return OrderStatistics(np.sort(np.concatenate([part.points for part in parts])), num_values)
    return OrderStatistics(quantiles(np.linspace(0, 1, SKETCH_POINTS)), num_values)


def _add_categories(sketches: Sequence[Sketch], name: str) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for block in sketches:
        total.update(block.categories[name])
    return total


def _quantile_function(parts: Sequence[OrderStatistics]) -> Callable[[Numbers], Numbers] | None:
    """Return a function that gives quantiles of all blocks, or None if there are no values.

    Each order statistic is weighted with the number of values that it represents.
    """
    parts = [part for part in parts if part.num_values]
    if not parts:
        return None
    points = np.concatenate([part.points for part in parts])
    weights = np.concatenate(
        [np.full(len(part.points), part.num_values / len(part.points)) for part in parts]
    )
    order = np.argsort(points, kind="stable")
    points, cumulative_weights = points[order], np.cumsum(weights[order])

    def quantiles(shares: Numbers) -> Numbers:
        targets = shares * cumulative_weights[-1] * (1 - 1e-12)
        values: Numbers = points[np.searchsorted(cumulative_weights, targets)]
        return values

    return quantiles


def _most_frequent(column: pa.ChunkedArray) -> Counter[Any]:
    counts = pc.value_counts(column.drop_null().combine_chunks())
    pairs = zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True)
    return Counter(dict(Counter(dict(pairs)).most_common(MAX_COUNTED)))


def _can_count(kind: pa.DataType, chosen: Distribution) -> bool:
    """Return False if the column's type does not fit the bins. A newer version of a view may change a type."""
    if not (pa.types.is_primitive(kind) or pa.types.is_string(kind)) or pa.types.is_date(kind):
        return False
    is_category = pa.types.is_string(kind) or pa.types.is_boolean(kind)
    if chosen.categories is None:
        return not is_category
    return all(isinstance(value, str) == pa.types.is_string(kind) for value in chosen.categories)


def _count(column: pa.ChunkedArray, chosen: Distribution) -> list[int]:
    if chosen.edges is not None:
        bin_numbers = np.searchsorted(np.array(chosen.edges), _numbers(column), side="left")
        return _bin_counts(bin_numbers, len(chosen.edges) + 1)
    categories = chosen.categories or []
    values = column.drop_null()
    indices = pc.index_in(values, value_set=pa.array(categories, type=values.type))
    bin_numbers = pc.fill_null(indices, len(categories)).to_numpy()
    return _bin_counts(bin_numbers, len(categories) + 1)


def _bin_counts(bin_numbers: npt.NDArray[np.int64], num_bins: int) -> list[int]:
    return [int(count) for count in np.bincount(bin_numbers, minlength=num_bins)]
