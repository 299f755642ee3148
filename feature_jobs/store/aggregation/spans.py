"""Aggregates over intervals of positions. Each value belongs to the positions of one interval.

The positions are the entity rows in order of entity and time. An interval goes from `start` to the position before
`stop`. Each function computes the results of all positions at once, in O((n + m) log m) for n values and m positions.
No function subtracts rounded numbers. All loops over rows are inside NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
NO_RANK = -1
"""Rank of a position that has no value."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Intervals of positions, one per value."""

    start: Ints
    """First position of each interval."""
    stop: Ints
    """Position after the last one of each interval."""
    rows: Ints
    """Row of each value."""
    num_positions: int
    """Number of positions."""

    def select(self, chosen: Bools) -> Spans:
        """Select intervals by a mask."""
        return Spans(self.start[chosen], self.stop[chosen], self.rows[chosen], self.num_positions)


def totals(spans: Spans, amounts: Ints) -> Ints:
    """Return the sum of `amounts` at each position.

    A sum that fits int64 is exact, even if the running totals overflow: int64 wraps around, so the differences of
    running totals are still right.
    """
    changes = np.zeros(spans.num_positions + 1, np.int64)
    np.add.at(changes, spans.start, amounts)
    np.subtract.at(changes, spans.stop, amounts)
    return np.cumsum(changes[:-1])


def counts(spans: Spans) -> Ints:
    """Return the number of values at each position."""
    size = spans.num_positions + 1
    changes = np.bincount(spans.start, minlength=size) - np.bincount(spans.stop, minlength=size)
    return np.cumsum(changes[:-1])


def greatest(spans: Spans, ranks: Ints) -> Ints:
    """Return the greatest rank at each position, `NO_RANK` without values. Ranks are 0 or more.

    It uses a segment tree over the positions: each interval is written to the few nodes that cover it, then each node
    passes its greatest rank down to its two children.
    """
    leaves = 1 << max(spans.num_positions - 1, 0).bit_length()
    nodes = np.full(2 * leaves, NO_RANK, np.int64)
    left, right = spans.start + leaves, spans.stop + leaves
    while left.size:
        odd_left, odd_right = (left & 1).astype(bool), (right & 1).astype(bool)
        np.maximum.at(nodes, left[odd_left], ranks[odd_left])
        np.maximum.at(nodes, right[odd_right] - 1, ranks[odd_right])
        left, right = (left + odd_left) >> 1, (right - odd_right) >> 1
        more = left < right
        left, right, ranks = left[more], right[more], ranks[more]
    width = 1
    while width < leaves:
        below = nodes[2 * width : 4 * width]
        np.maximum(below, np.repeat(nodes[width : 2 * width], 2), out=below)
        width *= 2
    return nodes[leaves : leaves + spans.num_positions]


def merge_equal_values(spans: Spans, values: Ints) -> Spans:
    """Merge overlapping intervals of equal values. Then `counts` gives the number of different values.

    Args:
        spans: The intervals.
        values: One code per value, 0 or more. Equal values have equal codes.
    """
    order = np.lexsort((spans.start, values))
    sorted_spans = Spans(spans.start[order], spans.stop[order], spans.rows[order], spans.num_positions)
    # The intervals of each value are shifted to a range of their own, so that one running maximum serves all values.
    shift = _dense_codes(values[order]) * (spans.num_positions + 2)
    reach = np.maximum.accumulate(sorted_spans.stop + shift)
    begins = np.ones(order.size, bool)
    begins[1:] = (sorted_spans.start + shift)[1:] > reach[:-1]
    heads = np.flatnonzero(begins)
    ends = np.append(heads[1:], order.size) - 1
    return Spans(
        sorted_spans.start[heads], (reach - shift)[ends], sorted_spans.rows[heads], spans.num_positions
    )


@dataclass(frozen=True, slots=True)
class PositionBlock:
    """Some positions, and the values that belong to them."""

    positions: Ints
    """The positions."""
    everywhere: Ints
    """Rows of the values that belong to all of these positions."""
    position_indices: Ints
    """For each pair of a position and another value: the position's index in `positions`."""
    rows: Ints
    """For each pair: the value's row."""


def iterate_blocks(spans: Spans, positions: Ints, *, size: int) -> Iterator[PositionBlock]:
    """Yield the values that belong to the given positions, `size` positions at a time.

    Args:
        spans: The intervals.
        positions: The positions, ascending.
        size: Number of positions per result.
    """
    for begin in range(0, positions.size, size):
        run = positions[begin : begin + size]
        first, last = np.searchsorted(run, spans.start), np.searchsorted(run, spans.stop)
        lengths = last - first
        everywhere = lengths == run.size
        lengths[everywhere] = 0
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        yield PositionBlock(
            positions=run,
            everywhere=spans.rows[everywhere],
            position_indices=np.repeat(first, lengths) + offsets,
            rows=np.repeat(spans.rows, lengths),
        )


def _dense_codes(sorted_codes: Ints) -> Ints:
    """Renumber ascending codes without gaps."""
    steps = np.zeros(sorted_codes.size, np.int64)
    steps[1:] = sorted_codes[1:] != sorted_codes[:-1]
    return np.cumsum(steps)
