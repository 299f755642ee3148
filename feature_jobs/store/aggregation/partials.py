"""What a tile knows of its events in short: one partial aggregate per column, and how answers are made of some of them.

A partial is a list of six: how many values, their sum (a whole number, or a few fractions with that exact sum), least,
greatest, the last one with its order, and the different ones (a list, or HyperLogLog registers where they are more than
`EXACT_DISTINCT`). What no output asks for stays empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cluster.errors import InvalidRequest
from feature_jobs.store.aggregation.exact_sum import exact_sum, grown
from feature_jobs.store.aggregation.hyperloglog import beyond, registers_of
from feature_jobs.store.definitions.aggregations import EXACT_DISTINCT

Partial = list[Any]
Ranked = tuple[int, int, int, Any]
"""A value after the event, created and sequence that `last` orders by."""
COUNT, SUM, LEAST, GREATEST, LAST, DISTINCT = range(6)


def empty() -> Partial:
    """Of no value."""
    return [0, None, None, None, None, None]


def add(partial: Partial, ranked: Ranked, functions: frozenset[str]) -> None:
    """Count one more value, which is not null."""
    value = ranked[3]
    partial[COUNT] += 1
    if "sum" in functions or "mean" in functions:
        partial[SUM] = _more(partial[SUM], value)
    if "min" in functions and (partial[LEAST] is None or value < partial[LEAST]):
        partial[LEAST] = value
    if "max" in functions and (partial[GREATEST] is None or value > partial[GREATEST]):
        partial[GREATEST] = value
    if "last" in functions and (partial[LAST] is None or ranked[:3] > tuple(partial[LAST][:3])):
        partial[LAST] = list(ranked)
    if "distinct" in functions:
        partial[DISTINCT] = _with_value(partial[DISTINCT] or [], value)


def answer(function: str, partials: Sequence[Partial], raw: Sequence[Ranked]) -> Any:
    """One function over the values of some partials, and some others.

    Raises:
        InvalidRequest: a sum of whole numbers is beyond int64.
    """
    match function:
        case "count":
            return sum(partial[COUNT] for partial in partials) + len(raw)
        case "sum":
            return _sum(partials, raw)
        case "mean":
            total = _sum(partials, raw)
            return None if total is None else float(total) / answer("count", partials, raw)
        case "min":
            return min(_values(LEAST, partials, raw), default=None)
        case "max":
            return max(_values(GREATEST, partials, raw), default=None)
        case "last":
            lasts = [tuple(partial[LAST]) for partial in partials if partial[LAST] is not None]
            return max((*lasts, *raw), key=lambda ranked: ranked[:3], default=(None,))[-1]
        case _:
            return _distinct([partial[DISTINCT] for partial in partials if partial[DISTINCT]], raw)


def _more(total: Any, value: Any) -> Any:
    if isinstance(value, float):
        return grown(total or [], value)
    return int(total or 0) + value


def _sum(partials: Sequence[Partial], raw: Sequence[Ranked]) -> float | int | None:
    sums = [partial[SUM] for partial in partials if partial[SUM] is not None]
    values = [ranked[3] for ranked in raw]
    if not sums and not values:
        return None
    if isinstance(sums[0], list) if sums else isinstance(values[0], float):
        return exact_sum([*(part for parts in sums for part in parts), *values])
    # A total beyond int64 is packed as text.
    total: int = sum(map(int, sums)) + sum(values)
    if not -(2**63) <= total < 2**63:
        raise InvalidRequest(
            f"A sum of whole numbers is beyond int64: {total}. Declare the column as float64."
        )
    return total


def _values(place: int, partials: Sequence[Partial], raw: Sequence[Ranked]) -> Iterable[Any]:
    return [
        *(partial[place] for partial in partials if partial[place] is not None),
        *(ranked[3] for ranked in raw),
    ]


def _with_value(known: Any, value: Any) -> Any:
    if isinstance(known, bytes):
        return np.maximum(np.frombuffer(known, np.uint8), registers_of([value])).tobytes()
    if value in known:
        return known
    known = [*known, value]
    return known if len(known) <= EXACT_DISTINCT else registers_of(known).tobytes()


def _distinct(sets: Sequence[Any], raw: Sequence[Ranked]) -> int:
    lists = [one for one in sets if not isinstance(one, bytes)]
    values = {ranked[3] for ranked in raw}.union(*lists)
    if len(lists) == len(sets) and len(values) <= EXACT_DISTINCT:
        return len(values)
    registers = registers_of(values)
    for one in sets:
        if isinstance(one, bytes):
            registers = np.maximum(registers, np.frombuffer(one, np.uint8))
    return beyond(EXACT_DISTINCT, registers)
