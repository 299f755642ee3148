"""Windowed aggregations for entity rows, exact to the event, with the meaning that `aggregations` states.

Every version of an event counts for a stretch of time: from when it was known until a later version of the event was
known or the window has left it behind, whichever is first. (That an event lies before t needs no check: it is known
only after it happened.) So the questions of an entity, in order of time, that see a version stand side by side, and
each aggregation is one over intervals (`spans`): no pairs of entity rows and events are ever made, and late
corrections cost nothing extra. Time is O((n + m) log m) for n events and m entity rows, memory O(n + m).

Pure functions over Polars frames and NumPy arrays; times are UTC microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from cluster.errors import TrainingSetError
from feature_jobs.store.aggregation.exact_sum import digits_of
from feature_jobs.store.aggregation.hyperloglog import REGISTERS, beyond, places_and_ranks, value_hash
from feature_jobs.store.aggregation.spans import (
    NONE,
    Bools,
    Ints,
    Spans,
    counts,
    greatest,
    members,
    merged,
    totals,
)
from feature_jobs.store.definitions.aggregations import EVERY, EXACT_DISTINCT, Output, WindowSpec
from feature_jobs.store.offline.point_in_time import AVAILABLE, Answers
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

_GROUP, _KNOWN, _UNTIL, _POSITION = "__group", "__known", "__until", "__position"
_NEVER = np.iinfo(np.int64).max
_PLACES_AT_ONCE = 256
_TIME = pl.Datetime("us", "UTC")
_DTYPES: dict[str, pl.DataType] = {
    "bool": pl.Boolean(),
    "int32": pl.Int32(),
    "int64": pl.Int64(),
    "float32": pl.Float32(),
    "float64": pl.Float64(),
    "string": pl.String(),
    "timestamp": _TIME,
    "date": pl.Date(),
}


@dataclass(frozen=True, slots=True)
class _Asked:
    """Entity rows in order of entity and time."""

    positions: Ints
    """Where each stood."""
    moments: Ints
    """All times asked for, rising, each once."""
    addresses: Ints
    """Entity and number of the moment as one number, rising."""

    def first(self, groups: Ints, times: Ints) -> Ints:
        """The first entity row of each entity that is not before a time; the end of its rows where none is."""
        numbers = np.searchsorted(self.moments, times)
        return np.searchsorted(self.addresses, groups * (self.moments.size + 1) + numbers)


def aggregate(
    entities: pl.DataFrame,
    events: pl.DataFrame,
    *,
    keys: Sequence[str],
    windows: WindowSpec,
    cutoff: bool = True,
) -> Answers:
    """The aggregations of each entity row as they were known at its time, and what was hidden from it.

    Args:
        entities: the keys and `event_timestamp`, in any order, with repetitions; of the dtypes the events have.
        events: the keys, `event_timestamp`, `created_timestamp`, `ingest_seq` (unique), the event id, the aggregated
            columns, and `deleted` where there may be tombstones; with no column at all where there are none.
        keys: columns that identify an entity. One with a null key is nobody, all of whose answers are null.
        windows: what to give.
        cutoff: leave out what was created after the entity row's time; else only the event's time counts.

    Returns:
        One column per output, one row per entity row in the same order; and how many entity rows see no event at all
        only because it was not known yet.

    Raises:
        TrainingSetError: the whole numbers of a column are too large to be summed as int64.
    """
    keys = list(keys)
    groups = entities.select(keys).unique().drop_nulls().with_row_index(_GROUP)
    groups = groups.with_columns(pl.col(_GROUP).cast(pl.Int64))
    numbered = entities.select(*keys, EVENT).join(groups, on=keys, how="left", maintain_order="left")
    known = numbered.select(_GROUP, EVENT).with_row_index(_POSITION).drop_nulls(_GROUP).sort(_GROUP, EVENT)
    rows = _typed(events, groups, windows).join(groups, on=keys)
    versions = _versions(rows, windows, cutoff=cutoff)
    answers = pl.DataFrame({_POSITION: known[_POSITION], **_answers(_asked(known), versions, windows)})
    everyone = pl.select(pl.int_range(entities.height, dtype=pl.UInt32).alias(_POSITION))
    return Answers(
        columns=everyone.join(answers, on=_POSITION, how="left", maintain_order="left").drop(_POSITION),
        hidden=_hidden(known, rows, versions, windows) if cutoff else 0,
        absent=numbered[_GROUP].is_null(),
    )


def _hidden(known: pl.DataFrame, rows: pl.DataFrame, versions: pl.DataFrame, windows: WindowSpec) -> int:
    """How many entity rows see no event only because of the cutoff."""
    if rows.select((pl.col(CREATED) <= pl.col(EVENT)).all()).item():
        return 0
    without = known.filter(counts(_seen(_asked(known), versions, windows.longest_us)) == 0)
    theirs = rows.join(without.select(_GROUP).unique(), on=_GROUP, how="semi")
    all_known = _versions(theirs, windows, cutoff=False)
    return int((counts(_seen(_asked(without), all_known, windows.longest_us)) > 0).sum())


def _typed(events: pl.DataFrame, groups: pl.DataFrame, windows: WindowSpec) -> pl.DataFrame:
    """The events with the dtypes that were declared: files from before a column existed have none of it."""
    dtypes = {windows.event_id: windows.event_id_dtype} | windows.columns
    declared: dict[Any, pl.DataType] = {name: _DTYPES[dtype] for name, dtype in dtypes.items()}
    if events.width == 0:
        keys: dict[str, Any] = {name: dtype for name, dtype in groups.schema.items() if name != _GROUP}
        return pl.DataFrame(schema=keys | {EVENT: _TIME, CREATED: _TIME, SEQ: pl.Int64} | declared)
    return events.cast(declared)


def _asked(known: pl.DataFrame) -> _Asked:
    times = _micros(known, EVENT)
    moments = np.unique(times)
    numbers = np.searchsorted(moments, times)
    return _Asked(
        positions=known[_POSITION].to_numpy(),
        moments=moments,
        addresses=known[_GROUP].to_numpy() * (moments.size + 1) + numbers,
    )


def _versions(events: pl.DataFrame, windows: WindowSpec, *, cutoff: bool) -> pl.DataFrame:
    """The versions of events with when they count from and until, ordered as `last` needs it; tombstones left out."""
    event = [_GROUP, windows.event_id]
    if DELETED not in events.columns:
        events = events.with_columns(pl.lit(False).alias(DELETED))
    events = events.with_columns((AVAILABLE if cutoff else pl.col(EVENT)).alias(_KNOWN))
    # Most events have one version, and need no window function.
    repeated = events.select(event).is_duplicated()
    later = pl.col(_KNOWN).cum_min(reverse=True).shift(-1).over(event)
    several = events.filter(repeated).sort(CREATED, SEQ).with_columns(later.alias(_UNTIL))
    single = events.filter(~repeated).with_columns(pl.lit(None, events.schema[_KNOWN]).alias(_UNTIL))
    return pl.concat([single, several]).filter(~pl.col(DELETED)).sort(EVENT, CREATED, SEQ)


def _seen(asked: _Asked, versions: pl.DataFrame, window_us: int) -> Spans:
    """Which entity rows see each version in their window."""
    groups = versions[_GROUP].to_numpy()
    start = asked.first(groups, _micros(versions, _KNOWN))
    until = versions[_UNTIL].dt.epoch("us").fill_null(_NEVER).to_numpy()
    stop = asked.first(groups, np.minimum(until, _micros(versions, EVENT) + window_us))
    seen = np.flatnonzero(start < stop)
    return Spans(start[seen], stop[seen], seen, asked.addresses.size)


def _answers(asked: _Asked, versions: pl.DataFrame, windows: WindowSpec) -> dict[str, pl.Series]:
    groups = versions[_GROUP].to_numpy()
    columns = {name: _Column.of(versions[name]) for name in windows.columns}
    answers: dict[str, pl.Series] = {}
    for window_us in dict.fromkeys(output.window_us for output in windows.outputs):
        every = _seen(asked, versions, window_us)
        sums: dict[str, pl.Series] = {}
        for output in windows.outputs:
            if output.window_us == window_us:
                answers[output.name] = _answer(output, every, columns, groups, sums)
    return {output.name: answers[output.name] for output in windows.outputs}


@dataclass(frozen=True, slots=True)
class _Column:
    """An aggregated column of the versions."""

    series: pl.Series
    present: Bools
    sorted_values: pl.Series
    """Its different values, rising."""
    ranks: Ints
    """Of each row's value among them; `NONE` for a null."""

    @classmethod
    def of(cls, series: pl.Series) -> _Column:
        if series.dtype.is_float():
            series = series + 0.0  # -0.0 is 0.0
        values = series.drop_nulls().unique().sort()
        ranks = series.rank("dense").cast(pl.Int64).fill_null(NONE + 1) - 1
        return cls(series, series.is_not_null().to_numpy(), values, ranks.to_numpy())


def _answer(
    output: Output, every: Spans, columns: dict[str, _Column], groups: Ints, sums: dict[str, pl.Series]
) -> pl.Series:
    """One output; sums of this window are kept in `sums`, for the means."""
    if output.column == EVERY:
        return pl.Series(counts(every))
    column = columns[output.column]
    spans = every.where(column.present[every.rows])
    match output.function:
        case "count":
            return pl.Series(counts(spans))
        case "sum":
            return _sums(output, column, spans, sums)
        case "mean":
            return _sums(output, column, spans, sums).cast(pl.Float64) / pl.Series(counts(spans))
        case "distinct":
            return pl.Series(_distinct(column, spans, groups))
        case "last":
            return _chosen(column.series, greatest(spans, spans.rows))
        case "max":
            return _chosen(column.sorted_values, greatest(spans, column.ranks[spans.rows]))
        case "min":
            highest = len(column.sorted_values) - 1
            ranks = greatest(spans, highest - column.ranks[spans.rows])
            return _chosen(column.sorted_values, np.where(ranks == NONE, NONE, highest - ranks))
        case _:
            raise AssertionError(output.function)


def _chosen(values: pl.Series, places: Ints) -> pl.Series:
    return values.gather(pl.Series(places).replace(NONE, None))


def _sums(output: Output, column: _Column, spans: Spans, known: dict[str, pl.Series]) -> pl.Series:
    """Sums, null where nothing counts."""
    if output.column not in known:
        sums = _whole_sums if column.series.dtype.is_integer() else _fraction_sums
        counting = pl.Series(counts(spans) > 0)
        total = sums(output, column.series, spans)
        known[output.column] = pl.select(pl.when(counting).then(total)).to_series()
    return known[output.column]


def _whole_sums(output: Output, series: pl.Series, spans: Spans) -> pl.Series:
    amounts = series.fill_null(0).cast(pl.Int64).to_numpy()[spans.rows]
    if np.abs(amounts.astype(np.float64)).sum() >= 2.0**63:
        raise TrainingSetError(
            f"The whole numbers of '{output.column}' are too large for {output.name}. "
            "Declare the column as float64."
        )
    return pl.Series(totals(spans, amounts))


def _fraction_sums(output: Output, series: pl.Series, spans: Spans) -> pl.Series:
    numbers = series.fill_null(0.0).cast(pl.Float64).to_numpy()[spans.rows]
    finite = np.isfinite(numbers)
    digits = digits_of(np.where(finite, numbers, 0.0))
    sums = digits.add_up([totals(spans, digit) for digit in digits.digits])
    if not finite.all():
        up, down = (counts(spans.where(numbers == infinity)) > 0 for infinity in (np.inf, -np.inf))
        sums = np.where(up, np.where(down, np.nan, np.inf), np.where(down, -np.inf, sums))
    return pl.Series(sums).fill_nan(None)


def _distinct(column: _Column, spans: Spans, groups: Ints) -> Ints:
    """Different values at each place: exact where few, estimated where many."""
    if spans.rows.size == 0:
        return counts(spans)
    codes = groups[spans.rows] * len(column.sorted_values) + column.ranks[spans.rows]
    spans = merged(spans, codes)
    found = counts(spans)
    many = np.flatnonzero(found > EXACT_DISTINCT)
    if many.size == 0:
        return found
    spans = spans.where(np.searchsorted(many, spans.stop) > np.searchsorted(many, spans.start))
    used, inverse = np.unique(column.ranks[spans.rows], return_inverse=True)
    hashes = np.fromiter(map(value_hash, column.sorted_values.gather(used).to_list()), np.uint64, used.size)
    registers, ranks = places_and_ranks(hashes)
    spans = Spans(spans.start, spans.stop, inverse, spans.places)
    for run in members(spans, many, size=_PLACES_AT_ONCE):
        shared = np.zeros(REGISTERS, np.uint8)
        np.maximum.at(shared, registers[run.everywhere], ranks[run.everywhere])
        filled = np.tile(shared, (run.places.size, 1))
        np.maximum.at(filled, (run.at, registers[run.rows]), ranks[run.rows])
        found[run.places] = [beyond(EXACT_DISTINCT, row) for row in filled]
    return found


def _micros(frame: pl.DataFrame, column: str) -> Ints:
    micros: Ints = frame[column].dt.epoch("us").to_numpy()
    return micros
