"""Aggregates over intervals: many values, each of which counts at a stretch of neighbouring places.

The places are the questions in order; a value counts at those from `start` up to, but not at, `stop`. Each function
answers all places at once, in O((n + m) log m) for n values and m places, and none subtracts what was rounded. NumPy
only; no loop over rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
NONE = -1
"""Stands for no value where ranks are asked for."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Where values count."""

    start: Ints
    stop: Ints
    rows: Ints
    """Which row each value is of."""
    places: int

    def where(self, chosen: Bools) -> Spans:
        """Some of them."""
        return Spans(self.start[chosen], self.stop[chosen], self.rows[chosen], self.places)


def totals(spans: Spans, amounts: Ints) -> Ints:
    """The sum at each place; exact as long as the answer fits, since whole numbers wrap around on the way."""
    changes = np.zeros(spans.places + 1, np.int64)
    np.add.at(changes, spans.start, amounts)
    np.subtract.at(changes, spans.stop, amounts)
    return np.cumsum(changes[:-1])


def counts(spans: Spans) -> Ints:
    """How many values count at each place."""
    size = spans.places + 1
    changes = np.bincount(spans.start, minlength=size) - np.bincount(spans.stop, minlength=size)
    return np.cumsum(changes[:-1])


def greatest(spans: Spans, ranks: Ints) -> Ints:
    """The greatest rank (0 or more) at each place, `NONE` where nothing counts.

    A segment tree over the places: each interval is written to the few nodes that make it up, then every node hands its
    greatest down to the two below it.
    """
    leaves = 1 << max(spans.places - 1, 0).bit_length()
    nodes = np.full(2 * leaves, NONE, np.int64)
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
    return nodes[leaves : leaves + spans.places]


def merged(spans: Spans, values: Ints) -> Spans:
    """One value's overlapping intervals made one, so that counting intervals is counting different values.

    Args:
        spans: where values count.
        values: a code, 0 or more, of each; the same code is the same value.
    """
    order = np.lexsort((spans.start, values))
    sorted_spans = Spans(spans.start[order], spans.stop[order], spans.rows[order], spans.places)
    # Each value gets a stretch of its own, so that one running maximum does for all of them.
    shift = _dense(values[order]) * (spans.places + 2)
    reach = np.maximum.accumulate(sorted_spans.stop + shift)
    begins = np.ones(order.size, bool)
    begins[1:] = (sorted_spans.start + shift)[1:] > reach[:-1]
    heads = np.flatnonzero(begins)
    ends = np.append(heads[1:], order.size) - 1
    return Spans(sorted_spans.start[heads], (reach - shift)[ends], sorted_spans.rows[heads], spans.places)


@dataclass(frozen=True, slots=True)
class Run:
    """Some of the places, and the values that count there."""

    places: Ints
    everywhere: Ints
    """Rows of the values that count at all of them."""
    at: Ints
    """Of the other values: which of these places (0 is the first) …"""
    rows: Ints
    """… and which row, pair by pair."""


def members(spans: Spans, places: Ints, *, size: int) -> Iterator[Run]:
    """Which values count at the given places (rising), some `size` places at a time."""
    for begin in range(0, places.size, size):
        run = places[begin : begin + size]
        first, last = np.searchsorted(run, spans.start), np.searchsorted(run, spans.stop)
        lengths = last - first
        everywhere = lengths == run.size
        lengths[everywhere] = 0
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        yield Run(
            places=run,
            everywhere=spans.rows[everywhere],
            at=np.repeat(first, lengths) + offsets,
            rows=np.repeat(spans.rows, lengths),
        )


def _dense(sorted_codes: Ints) -> Ints:
    """Codes that rise, numbered without gaps."""
    steps = np.zeros(sorted_codes.size, np.int64)
    steps[1:] = sorted_codes[1:] != sorted_codes[:-1]
    return np.cumsum(steps)
