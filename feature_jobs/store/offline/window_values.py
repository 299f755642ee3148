"""Windowed aggregations for entity rows, exact to the event. `definitions/aggregations.py` defines their meaning.

A version of an event is used during one interval of time. The interval begins when the version became known. It ends
when a later version of the event became known, or when the event left the window, whichever is first. (An event after t
needs no check, because it is known only after it happened.) So in order of time, the entity rows that use a version are
next to each other, and each aggregation is over intervals (`spans`). No pairs of entity rows and events are made, and
late corrections have no extra cost. For n events and m entity rows, time is O((n + m) log m) and memory O(n + m).

All functions are pure, over Polars frames and NumPy arrays. Times are UTC microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from cluster.errors import TrainingSetError
from feature_jobs.store.aggregation.exact_sum import split_digits
from feature_jobs.store.aggregation.hyperloglog import (
    REGISTERS,
    estimate_above,
    registers_and_ranks,
    value_hash,
)
from feature_jobs.store.aggregation.spans import (
    NO_RANK,
    Bools,
    Ints,
    Spans,
    counts,
    greatest,
    iterate_blocks,
    merge_equal_values,
    totals,
)
from feature_jobs.store.definitions.aggregations import ALL_EVENTS, EXACT_DISTINCT, Output, WindowSpec
from feature_jobs.store.offline.point_in_time import AVAILABLE, JoinResult
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

_GROUP, _KNOWN, _UNTIL, _POSITION = "__group", "__known", "__until", "__position"
_NEVER = np.iinfo(np.int64).max
_ROWS_AT_ONCE = 256
"""Number of entity rows whose distinct counts are estimated at the same time."""
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
class _EntityRows:
    """Entity rows, sorted by entity and time."""

    positions: Ints
    """Position of each row in the input."""
    moments: Ints
    """The distinct times of all rows, ascending."""
    codes: Ints
    """Entity and index of its time in `moments`, combined into one number, ascending."""

    def first(self, groups: Ints, times: Ints) -> Ints:
        """Return the first row of each entity at or after a time, or the end of the entity's rows."""
        numbers = np.searchsorted(self.moments, times)
        return np.searchsorted(self.codes, groups * (self.moments.size + 1) + numbers)


def aggregate(
    entities: pl.DataFrame,
    events: pl.DataFrame,
    *,
    keys: Sequence[str],
    windows: WindowSpec,
    cutoff: bool = True,
) -> JoinResult:
    """Aggregate, for each entity row, the events that were known at its time.

    Args:
        entities: join keys and `event_timestamp`, in any order, repetitions allowed; same dtypes as in `events`.
        events: join keys, `event_timestamp`, `created_timestamp`, `ingest_seq` (unique), the event id, the aggregated
            columns, and `deleted` if there may be tombstones. A frame without columns means no events.
        keys: join keys. For an entity row with a null key all results are null.
        windows: the aggregations.
        cutoff: whether to hide rows that were created after the entity row's time. If false, only event times are
            compared.

    Returns:
        One column for each output, one row for each entity row in the same order. `hidden` counts the entity rows that
        have no event only because of the cutoff.

    Raises:
        TrainingSetError: the whole numbers of a column are too large for a sum as int64.
    """
    keys = list(keys)
    groups = entities.select(keys).unique().drop_nulls().with_row_index(_GROUP)
    groups = groups.with_columns(pl.col(_GROUP).cast(pl.Int64))
    numbered = entities.select(*keys, EVENT).join(groups, on=keys, how="left", maintain_order="left")
    known = numbered.select(_GROUP, EVENT).with_row_index(_POSITION).drop_nulls(_GROUP).sort(_GROUP, EVENT)
    rows = _typed(events, groups, windows).join(groups, on=keys)
    versions = _versions(rows, windows, cutoff=cutoff)
    results = pl.DataFrame({_POSITION: known[_POSITION], **_results(_entity_rows(known), versions, windows)})
    positions = pl.select(pl.int_range(entities.height, dtype=pl.UInt32).alias(_POSITION))
    return JoinResult(
        columns=positions.join(results, on=_POSITION, how="left", maintain_order="left").drop(_POSITION),
        hidden=_count_hidden(known, rows, versions, windows) if cutoff else 0,
        absent=numbered[_GROUP].is_null(),
    )


def _count_hidden(
    known: pl.DataFrame, rows: pl.DataFrame, versions: pl.DataFrame, windows: WindowSpec
) -> int:
    """Count the entity rows that have no event only because of the cutoff."""
    if rows.select((pl.col(CREATED) <= pl.col(EVENT)).all()).item():
        return 0
    without_events = known.filter(counts(_seen(_entity_rows(known), versions, windows.longest_us)) == 0)
    candidates = rows.join(without_events.select(_GROUP).unique(), on=_GROUP, how="semi")
    all_versions = _versions(candidates, windows, cutoff=False)
    return int((counts(_seen(_entity_rows(without_events), all_versions, windows.longest_us)) > 0).sum())


def _typed(events: pl.DataFrame, groups: pl.DataFrame, windows: WindowSpec) -> pl.DataFrame:
    """Cast the events to the declared dtypes. In files from before a column existed, it is null without a type."""
    dtypes = {windows.event_id: windows.event_id_dtype} | windows.columns
    declared: dict[Any, pl.DataType] = {name: _DTYPES[dtype] for name, dtype in dtypes.items()}
    if events.width == 0:
        keys: dict[str, Any] = {name: dtype for name, dtype in groups.schema.items() if name != _GROUP}
        return pl.DataFrame(schema=keys | {EVENT: _TIME, CREATED: _TIME, SEQ: pl.Int64} | declared)
    return events.cast(declared)


def _entity_rows(known: pl.DataFrame) -> _EntityRows:
    times = _micros(known, EVENT)
    moments = np.unique(times)
    numbers = np.searchsorted(moments, times)
    return _EntityRows(
        positions=known[_POSITION].to_numpy(),
        moments=moments,
        codes=known[_GROUP].to_numpy() * (moments.size + 1) + numbers,
    )


def _versions(events: pl.DataFrame, windows: WindowSpec, *, cutoff: bool) -> pl.DataFrame:
    """Return each version with the interval in which it is used, without tombstones, sorted for `last`."""
    event = [_GROUP, windows.event_id]
    if DELETED not in events.columns:
        events = events.with_columns(pl.lit(False).alias(DELETED))
    events = events.with_columns((AVAILABLE if cutoff else pl.col(EVENT)).alias(_KNOWN))
    # Most events have one version and do not need `over`.
    repeated = events.select(event).is_duplicated()
    later = pl.col(_KNOWN).cum_min(reverse=True).shift(-1).over(event)
    several = events.filter(repeated).sort(CREATED, SEQ).with_columns(later.alias(_UNTIL))
    single = events.filter(~repeated).with_columns(pl.lit(None, events.schema[_KNOWN]).alias(_UNTIL))
    return pl.concat([single, several]).filter(~pl.col(DELETED)).sort(EVENT, CREATED, SEQ)


def _seen(entity_rows: _EntityRows, versions: pl.DataFrame, window_us: int) -> Spans:
    """For each version, return the range of entity rows that use it: their windows contain it."""
    groups = versions[_GROUP].to_numpy()
    start = entity_rows.first(groups, _micros(versions, _KNOWN))
    until = versions[_UNTIL].dt.epoch("us").fill_null(_NEVER).to_numpy()
    stop = entity_rows.first(groups, np.minimum(until, _micros(versions, EVENT) + window_us))
    seen = np.flatnonzero(start < stop)
    return Spans(start[seen], stop[seen], seen, entity_rows.codes.size)


def _results(entity_rows: _EntityRows, versions: pl.DataFrame, windows: WindowSpec) -> dict[str, pl.Series]:
    groups = versions[_GROUP].to_numpy()
    columns = {name: _Column.of(versions[name]) for name in windows.columns}
    results: dict[str, pl.Series] = {}
    for window_us in dict.fromkeys(output.window_us for output in windows.outputs):
        in_window = _seen(entity_rows, versions, window_us)
        sums: dict[str, pl.Series] = {}
        for output in windows.outputs:
            if output.window_us == window_us:
                results[output.name] = _result(output, in_window, columns, groups, sums)
    return {output.name: results[output.name] for output in windows.outputs}


@dataclass(frozen=True, slots=True)
class _Column:
    """An aggregated column of the versions."""

    series: pl.Series
    present: Bools
    sorted_values: pl.Series
    """The distinct values, ascending."""
    ranks: Ints
    """Index of each row's value in `sorted_values`; `NO_RANK` for a null."""

    @classmethod
    def of(cls, series: pl.Series) -> _Column:
        if series.dtype.is_float():
            series = series + 0.0  # -0.0 is 0.0
        values = series.drop_nulls().unique().sort()
        ranks = series.rank("dense").cast(pl.Int64).fill_null(NO_RANK + 1) - 1
        return cls(series, series.is_not_null().to_numpy(), values, ranks.to_numpy())


def _result(
    output: Output, in_window: Spans, columns: dict[str, _Column], groups: Ints, sums: dict[str, pl.Series]
) -> pl.Series:
    """Compute one output. The dict `sums` caches the sums of this window, which the means need too."""
    if output.column == ALL_EVENTS:
        return pl.Series(counts(in_window))
    column = columns[output.column]
    spans = in_window.select(column.present[in_window.rows])
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
            return _gather(column.series, greatest(spans, spans.rows))
        case "max":
            return _gather(column.sorted_values, greatest(spans, column.ranks[spans.rows]))
        case "min":
            highest = len(column.sorted_values) - 1
            ranks = greatest(spans, highest - column.ranks[spans.rows])
            return _gather(column.sorted_values, np.where(ranks == NO_RANK, NO_RANK, highest - ranks))
        case _:
            raise AssertionError(output.function)


def _gather(values: pl.Series, indices: Ints) -> pl.Series:
    """Return values by index; null for the index `NO_RANK`."""
    return values.gather(pl.Series(indices).replace(NO_RANK, None))


def _sums(output: Output, column: _Column, spans: Spans, cache: dict[str, pl.Series]) -> pl.Series:
    """Return the sums; null if there is no value."""
    if output.column not in cache:
        sums = _whole_sums if column.series.dtype.is_integer() else _fraction_sums
        has_values = pl.Series(counts(spans) > 0)
        total = sums(output, column.series, spans)
        cache[output.column] = pl.select(pl.when(has_values).then(total)).to_series()
    return cache[output.column]


def _whole_sums(output: Output, series: pl.Series, spans: Spans) -> pl.Series:
    amounts = series.fill_null(0).cast(pl.Int64).to_numpy()[spans.rows]
    if np.abs(amounts.astype(np.float64)).sum() >= 2.0**63:
        raise TrainingSetError(
            f"The whole numbers of '{output.column}' are too large for an int64 sum in {output.name}. "
            "Declare the column as float64."
        )
    return pl.Series(totals(spans, amounts))


def _fraction_sums(output: Output, series: pl.Series, spans: Spans) -> pl.Series:
    numbers = series.fill_null(0.0).cast(pl.Float64).to_numpy()[spans.rows]
    finite = np.isfinite(numbers)
    digits = split_digits(np.where(finite, numbers, 0.0))
    sums = digits.total([totals(spans, digit) for digit in digits.digits])
    if not finite.all():
        up, down = (counts(spans.select(numbers == infinity)) > 0 for infinity in (np.inf, -np.inf))
        sums = np.where(up, np.where(down, np.nan, np.inf), np.where(down, -np.inf, sums))
    return pl.Series(sums).fill_nan(None)


def _distinct(column: _Column, spans: Spans, groups: Ints) -> Ints:
    """Count the distinct values for each entity row: exactly up to `EXACT_DISTINCT`, estimated above."""
    if spans.rows.size == 0:
        return counts(spans)
    codes = groups[spans.rows] * len(column.sorted_values) + column.ranks[spans.rows]
    spans = merge_equal_values(spans, codes)
    distinct = counts(spans)
    many = np.flatnonzero(distinct > EXACT_DISTINCT)
    if many.size == 0:
        return distinct
    spans = spans.select(np.searchsorted(many, spans.stop) > np.searchsorted(many, spans.start))
    used, inverse = np.unique(column.ranks[spans.rows], return_inverse=True)
    hashes = np.fromiter(map(value_hash, column.sorted_values.gather(used).to_list()), np.uint64, used.size)
    registers, ranks = registers_and_ranks(hashes)
    spans = Spans(spans.start, spans.stop, inverse, spans.num_positions)
    for run in iterate_blocks(spans, many, size=_ROWS_AT_ONCE):
        shared = np.zeros(REGISTERS, np.uint8)
        np.maximum.at(shared, registers[run.everywhere], ranks[run.everywhere])
        filled = np.tile(shared, (run.positions.size, 1))
        np.maximum.at(filled, (run.position_indices, registers[run.rows]), ranks[run.rows])
        distinct[run.positions] = [estimate_above(EXACT_DISTINCT, row) for row in filled]
    return distinct


def _micros(frame: pl.DataFrame, column: str) -> Ints:
    micros: Ints = frame[column].dt.epoch("us").to_numpy()
    return micros
