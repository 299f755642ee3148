"""Partial aggregates of a tile's columns, and results that are computed from several partial aggregates.

A partial is a list of six fields, indexed by the constants below:

    COUNT     the number of values
    SUM       their sum: a whole number, or a few floats with this exact sum
    MIN, MAX  the least and the greatest value
    LAST      the last value after its event time, created time and sequence number (a `RankedValue`, as a list)
    DISTINCT  the different values: a list, or HyperLogLog registers for more than `EXACT_DISTINCT` values

Fields that no feature needs stay None. A partial is a list and not a class, because an online read unpacks up to 260 of
them per column, and lists come from msgpack without conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cluster.errors import InvalidRequest
from feature_jobs.store.aggregation.exact_sum import add_exactly, exact_sum
from feature_jobs.store.aggregation.hyperloglog import estimate_above, registers_of
from feature_jobs.store.definitions.aggregations import EXACT_DISTINCT, Function

Partial = list[Any]
COUNT, SUM, MIN, MAX, LAST, DISTINCT = range(6)
RankedValue = tuple[int, int, int, Any]
"""Event time, created time and sequence number, by which `last` orders values; then the value."""
Update = Callable[[Partial, RankedValue], None]
Answer = Callable[[Sequence[Partial], Sequence[RankedValue]], Any]


def empty() -> Partial:
    """Return a partial without values."""
    return [0, None, None, None, None, None]


def updates_for(functions: Iterable[Function]) -> tuple[Update, ...]:
    """Return the updates that a partial of these aggregation functions needs."""
    return tuple(dict.fromkeys(_UPDATES[function] for function in functions if function in _UPDATES))


def add(partial: Partial, ranked: RankedValue, updates: Iterable[Update]) -> None:
    """Add one value to a partial. The value must not be null.

    Args:
        partial: The partial. Changed in place.
        ranked: The value.
        updates: The result of `updates_for`.
    """
    partial[COUNT] += 1
    for update in updates:
        update(partial, ranked)


def answer(function: Function, partials: Sequence[Partial], values: Sequence[RankedValue]) -> Any:
    """Compute an aggregation function over the values in partials and over single values.

    Raises:
        InvalidRequest: A sum of whole numbers is outside int64.
    """
    return _ANSWERS[function](partials, values)


def _add_to_sum(partial: Partial, ranked: RankedValue) -> None:
    total, value = partial[SUM], ranked[3]
    partial[SUM] = add_exactly(total or [], value) if isinstance(value, float) else int(total or 0) + value


def _add_to_min(partial: Partial, ranked: RankedValue) -> None:
    value = ranked[3]
    if partial[MIN] is None or value < partial[MIN]:
        partial[MIN] = value


def _add_to_max(partial: Partial, ranked: RankedValue) -> None:
    value = ranked[3]
    if partial[MAX] is None or value > partial[MAX]:
        partial[MAX] = value


def _add_to_last(partial: Partial, ranked: RankedValue) -> None:
    if partial[LAST] is None or ranked[:3] > tuple(partial[LAST][:3]):
        partial[LAST] = list(ranked)


def _add_to_distinct(partial: Partial, ranked: RankedValue) -> None:
    distinct, value = partial[DISTINCT] or [], ranked[3]
    if isinstance(distinct, bytes):
        partial[DISTINCT] = np.maximum(np.frombuffer(distinct, np.uint8), registers_of([value])).tobytes()
    elif value not in distinct:
        distinct = [*distinct, value]
        partial[DISTINCT] = distinct if len(distinct) <= EXACT_DISTINCT else registers_of(distinct).tobytes()


def _count(partials: Sequence[Partial], values: Sequence[RankedValue]) -> int:
    num_summarised: int = sum(partial[COUNT] for partial in partials)
    return num_summarised + len(values)


def _sum(partials: Sequence[Partial], ranked_values: Sequence[RankedValue]) -> float | int | None:
    sums = [partial[SUM] for partial in partials if partial[SUM] is not None]
    values = [ranked[3] for ranked in ranked_values]
    if not sums and not values:
        return None
    if isinstance(sums[0], list) if sums else isinstance(values[0], float):
        return exact_sum([*(part for parts in sums for part in parts), *values])
    # A sum outside int64 is packed as text.
    total: int = sum(map(int, sums)) + sum(values)
    if not -(2**63) <= total < 2**63:
        raise InvalidRequest(
            f"A sum of whole numbers is outside int64: {total}. Declare the column as float64."
        )
    return total


def _mean(partials: Sequence[Partial], values: Sequence[RankedValue]) -> float | None:
    total = _sum(partials, values)
    return None if total is None else float(total) / _count(partials, values)


def _min(partials: Sequence[Partial], values: Sequence[RankedValue]) -> Any:
    return min(_candidates(MIN, partials, values), default=None)


def _max(partials: Sequence[Partial], values: Sequence[RankedValue]) -> Any:
    return max(_candidates(MAX, partials, values), default=None)


def _candidates(field: int, partials: Sequence[Partial], values: Sequence[RankedValue]) -> list[Any]:
    """Return one field of the partials, and the single values."""
    fields = [partial[field] for partial in partials if partial[field] is not None]
    return [*fields, *(ranked[3] for ranked in values)]


def _last(partials: Sequence[Partial], values: Sequence[RankedValue]) -> Any:
    lasts = [tuple(partial[LAST]) for partial in partials if partial[LAST] is not None]
    return max((*lasts, *values), key=lambda ranked: ranked[:3], default=(None,))[-1]


def _distinct(partials: Sequence[Partial], ranked_values: Sequence[RankedValue]) -> int:
    fields = [partial[DISTINCT] for partial in partials if partial[DISTINCT]]
    lists = [field for field in fields if not isinstance(field, bytes)]
    values = {ranked[3] for ranked in ranked_values}.union(*lists)
    if len(lists) == len(fields) and len(values) <= EXACT_DISTINCT:
        return len(values)
    registers = registers_of(values)
    for field in fields:
        if isinstance(field, bytes):
            registers = np.maximum(registers, np.frombuffer(field, np.uint8))
    return estimate_above(EXACT_DISTINCT, registers)


_UPDATES: dict[Function, Update] = {
    Function.SUM: _add_to_sum,
    Function.MEAN: _add_to_sum,
    Function.MIN: _add_to_min,
    Function.MAX: _add_to_max,
    Function.LAST: _add_to_last,
    Function.DISTINCT: _add_to_distinct,
}
"""How each function adds a value. `count` needs no field but COUNT, which every value increases."""
_ANSWERS: dict[Function, Answer] = {
    Function.COUNT: _count,
    Function.SUM: _sum,
    Function.MEAN: _mean,
    Function.MIN: _min,
    Function.MAX: _max,
    Function.LAST: _last,
    Function.DISTINCT: _distinct,
}
