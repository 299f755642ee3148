"""What a batch looked like: the measure that the next one is held against.

A profile is made in two passes over a batch's blocks, both of which add up: the first gives counts and a sketch of each
feature, from which cut points are chosen; the second counts exactly between them. It holds no row and neither the least
nor the greatest value, but quartiles and categories are values all the same. So it lies with the quarantine, under its
key, and the ledger gets `summary` alone: how many rows, and how many nulls a column has.

Rows that went to quarantine count among the nulls, where a broken source shows first, and not in a distribution, which
tells what good rows look like.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from feature_jobs.store.definitions.views import Field
from feature_jobs.store.types.dtypes import is_rich
from feature_jobs.store.types.schema import DELETED

Numbers = npt.NDArray[np.float64]

NUM_BINS = 10
SKETCH_POINTS = 257
"""Of a block's numbers; a cut point's rank is off by at most one in 256."""
MAX_CATEGORIES = 50
MAX_COUNTED = 10_000
"""Distinct categories that one block reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """How a feature's values are spread."""

    counts: list[int]
    edges: list[float] | None = None
    """Of numbers: ascending cut points; a bin reaches to its upper one, included, and the last has none."""
    categories: list[Any] | None = None
    """Of categories: the most frequent; the last count is of all others."""
    quartiles: list[float] | None = None
    """Of numbers: three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A batch in bounded size."""

    rows_in: int
    rows: int
    """Without those in quarantine."""
    nulls: dict[str, int]
    """Of all rows, by feature."""
    newest_event_us: int | None
    distributions: dict[str, Distribution]

    def summary(self) -> dict[str, Any]:
        """What may be said in the ledger: no value."""
        return {"rows_in": self.rows_in, "rows": self.rows, "nulls": self.nulls}

    def to_json(self) -> str:
        """The whole profile."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The profile that `to_json` gave."""
        data = json.loads(text)
        distributions = {name: Distribution(**one) for name, one in data.pop("distributions").items()}
        return cls(**data, distributions=distributions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sketch:
    """What one block says in the first pass."""

    rows_in: int
    rows: int
    nulls: dict[str, int]
    newest_event_us: int | None
    numbers: dict[str, tuple[Numbers, int]]
    """Evenly spaced order statistics, and how many values they stand for."""
    categories: dict[str, Counter[Any]]


def sketch(block: pa.Table, good: pa.Table, fields: Sequence[Field]) -> Sketch:
    """The first pass over a validated block and its good rows; a tombstone's values are not missing."""
    alive = block.filter(pc.invert(block[DELETED])) if DELETED in block.column_names else block
    newest = pc.max(good["event_timestamp"]).cast(pa.int64()).as_py()
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


def bins(sketches: Sequence[Sketch]) -> dict[str, Distribution]:
    """Cut points and categories for a batch, chosen by its sketches; nothing is counted yet."""
    chosen: dict[str, Distribution] = {}
    for name in sketches[0].numbers if sketches else ():
        quantiles = _merged([one.numbers[name] for one in sketches])
        if quantiles is not None:
            inner = quantiles(np.arange(1, NUM_BINS) / NUM_BINS)
            quartiles = [float(value) for value in quantiles(np.array([0.25, 0.5, 0.75]))]
            chosen[name] = Distribution(counts=[], edges=np.unique(inner).tolist(), quartiles=quartiles)
    for name in sketches[0].categories if sketches else ():
        total: Counter[Any] = Counter()
        for one in sketches:
            total.update(one.categories[name])
        ranked = sorted(total.items(), key=lambda item: (-item[1], str(item[0])))
        if ranked:
            chosen[name] = Distribution(counts=[], categories=[value for value, _ in ranked[:MAX_CATEGORIES]])
    return chosen


def count(good: pa.Table, chosen: Mapping[str, Distribution]) -> dict[str, list[int]]:
    """The second pass: how many values of a block's good rows lie in each bin; a column that is gone is left out."""
    there = set(good.column_names)
    return {
        name: _count(good[name], one)
        for name, one in chosen.items()
        if name in there and _can_count(good[name].type, one)
    }


def profile(
    sketches: Sequence[Sketch],
    chosen: Mapping[str, Distribution],
    counted: Iterable[Mapping[str, Sequence[int]]],
) -> Profile:
    """A batch's profile from both passes over its blocks."""
    totals = added(counted)
    nulls: Counter[str] = Counter()
    for one in sketches:
        nulls.update(one.nulls)
    times = [one.newest_event_us for one in sketches if one.newest_event_us is not None]
    return Profile(
        rows_in=sum(one.rows_in for one in sketches),
        rows=sum(one.rows for one in sketches),
        nulls=dict(nulls),
        newest_event_us=max(times, default=None),
        distributions={
            name: Distribution(
                counts=totals[name], edges=one.edges, categories=one.categories, quartiles=one.quartiles
            )
            for name, one in chosen.items()
            if name in totals
        },
    )


def added(counted: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """Counts of several blocks under the same bins, added up."""
    totals: dict[str, list[int]] = {}
    for block in counted:
        for name, counts in block.items():
            before = totals.get(name, [0] * len(counts))
            totals[name] = [one + other for one, other in zip(before, counts, strict=True)]
    return totals


def is_categorical(field: Field) -> bool:
    """Whether a feature is counted by value, and not between cut points."""
    return field.categorical or field.dtype in ("string", "bool")


def _numbers(column: pa.ChunkedArray) -> Numbers:
    known = column.drop_null()
    if pa.types.is_timestamp(known.type):
        known = known.cast(pa.int64())
    return np.asarray(known.to_numpy(), dtype=np.float64)


def _order_statistics(values: Numbers) -> tuple[Numbers, int]:
    ordered = np.sort(values)
    if len(ordered) > SKETCH_POINTS:
        ordered = ordered[np.linspace(0, len(ordered) - 1, SKETCH_POINTS).round().astype(np.int64)]
    return ordered, len(values)


def _merged(parts: Sequence[tuple[Numbers, int]]) -> Any:
    """Quantiles of all blocks: each order statistic weighs as many values as it stands for."""
    parts = [(points, total) for points, total in parts if total]
    if not parts:
        return None
    points = np.concatenate([points for points, _ in parts])
    weights = np.concatenate([np.full(len(points), total / len(points)) for points, total in parts])
    order = np.argsort(points, kind="stable")
    points, reached = points[order], np.cumsum(weights[order])

    def quantiles(shares: Numbers) -> Numbers:
        at: Numbers = points[np.searchsorted(reached, shares * reached[-1] * (1 - 1e-12))]
        return at

    return quantiles


def _most_frequent(column: pa.ChunkedArray) -> Counter[Any]:
    counts = pc.value_counts(column.drop_null().combine_chunks())
    pairs = zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True)
    return Counter(dict(Counter(dict(pairs)).most_common(MAX_COUNTED)))


def _can_count(kind: pa.DataType, chosen: Distribution) -> bool:
    """A newer version of the view may have the feature as another kind."""
    if not (pa.types.is_primitive(kind) or pa.types.is_string(kind)) or pa.types.is_date(kind):
        return False
    textual = pa.types.is_string(kind) or pa.types.is_boolean(kind)
    if chosen.categories is None:
        return not textual
    return all(isinstance(value, str) == pa.types.is_string(kind) for value in chosen.categories)


def _count(column: pa.ChunkedArray, chosen: Distribution) -> list[int]:
    if chosen.edges is not None:
        places = np.searchsorted(np.array(chosen.edges), _numbers(column), side="left")
        return [int(one) for one in np.bincount(places, minlength=len(chosen.edges) + 1)]
    categories = chosen.categories or []
    known = column.drop_null()
    found = pc.index_in(known, value_set=pa.array(categories, type=known.type))
    places = pc.fill_null(found, len(categories)).to_numpy()
    return [int(one) for one in np.bincount(places, minlength=len(categories) + 1)]
