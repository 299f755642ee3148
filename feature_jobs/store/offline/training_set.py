"""The point-in-time join over all views of a service, bucket by bucket.

Only the entity rows are hashed: each view's rows lie in the bucket of their keys already. A bucket is one unit of work,
done in this process while the work is small and in a Ray task each when it is large; memory is bounded by a bucket.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import TrainingSetError
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec
from feature_jobs.store.definitions.missing import fill
from feature_jobs.store.definitions.views import DTYPES
from feature_jobs.store.offline.buckets import bucket_of
from feature_jobs.store.offline.point_in_time import answer
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.offline.windows import aggregate
from feature_jobs.store.on_demand import with_on_demand
from feature_jobs.store.types.casting import cast_time, is_text
from feature_jobs.store.types.columns import with_appended
from feature_jobs.store.types.instants import Rounding
from feature_jobs.store.types.key_types import beyond_range, kind_of
from feature_jobs.store.types.schema import EVENT

POSITION, ABSENT = "__position", "__absent"
THREADS = min(4, os.cpu_count() or 1)
"""Buckets that are joined at once in a process; memory is bounded by as many."""
Part = tuple[int, pl.DataFrame]
"""A bucket, and the entity rows in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A bucket's entity rows with their features, positions and whether nothing was found."""

    frame: pl.DataFrame
    hidden: int
    """As of `point_in_time.Answers`."""


JoinParts = Callable[[Snapshot, ViewSpec, list[Part], bool], list[Joined]]
"""Joins the buckets of one view, with or without the cutoff."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One view's features for all entity rows, in their order."""

    table: pa.Table
    hidden: int
    """As of `point_in_time.Answers`."""
    absent: pa.Array
    """Bool: nothing was found, or nothing fresh."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """A training set."""

    table: pa.Table
    hidden: dict[str, int]
    """By view, the entity rows that have no answer only because of the cutoff."""
    absent: dict[str, int]
    """By view, the entity rows that have no answer, or none that is fresh."""


def build(
    spec: ServiceSpec, snapshots: dict[str, Snapshot], entities: pa.Table, *, join_parts: JoinParts
) -> pa.Table:
    """The rows alone, with the cutoff; arguments as of `assemble`."""
    return assemble(spec, snapshots, entities, join_parts=join_parts).table


def assemble(
    spec: ServiceSpec,
    snapshots: dict[str, Snapshot],
    entities: pa.Table,
    *,
    join_parts: JoinParts,
    cutoff: bool = True,
) -> Built:
    """Every entity row in its order, its columns, then `<view>__<feature>` of each view.

    Args:
        spec: the service.
        snapshots: the pinned table of each view.
        entities: join keys and `event_timestamp`, with any other columns.
        join_parts: joins the buckets of one view, here or in Ray tasks.
        cutoff: leave out what was created after an entity row's time.

    Raises:
        TrainingSetError: a key or the timestamp is missing or has the wrong type.
    """
    times = event_times(entities)
    output, answers = entities, {}
    given = set(entities.column_names)
    for name in spec.columns:
        if name in given:
            raise TrainingSetError(
                f"The entity rows have a column '{name}' already, the name of a feature. Rename it."
            )
    for view in spec.views:
        snapshot = snapshots[view.name]
        keys = {key: key_column(key, kind, view, spec, output) for key, kind in snapshot.key_types.items()}
        asked = pa.table({**keys, EVENT: times})
        answers[view.name] = joined(view, snapshot, asked, join_parts, cutoff=cutoff)
        columns = zip(view.columns, answers[view.name].table.columns, strict=True)
        output = with_appended(output, dict(columns))
    output = fill(spec.missing, output, {name: one.absent for name, one in answers.items()})
    return Built(
        table=with_on_demand(spec, output),
        hidden={name: one.hidden for name, one in answers.items()},
        absent={name: one.absent.true_count for name, one in answers.items()},
    )


def joined(
    view: ViewSpec, snapshot: Snapshot, asked: pa.Table, join_parts: JoinParts, *, cutoff: bool = True
) -> Answered:
    """The features of one view for keys and times."""
    buckets = bucket_of(asked, list(snapshot.key_types), num_buckets=snapshot.num_buckets)
    frame = pl.DataFrame(pl.from_arrow(asked)).with_row_index(POSITION)
    parts = [(int(bucket), frame.filter(pl.Series(buckets == bucket))) for bucket in np.unique(buckets)]
    answers = join_parts(snapshot, view, parts, cutoff)
    names = [field.name for field in view.fields]
    schema = pa.schema([pa.field(field.name, DTYPES[field.dtype]) for field in view.fields])
    if not answers:
        return Answered(table=schema.empty_table(), hidden=0, absent=pa.array([], pa.bool_()))
    frames = [answer.frame for answer in answers]
    whole = pl.concat(frames, how="vertical_relaxed").sort(POSITION)
    return Answered(
        table=whole.select(names).to_arrow().cast(schema),
        hidden=sum(answer.hidden for answer in answers),
        absent=whole[ABSENT].to_arrow(),
    )


def join_here(snapshot: Snapshot, view: ViewSpec, parts: list[Part], cutoff: bool) -> list[Joined]:
    """Join the buckets in this process, a few at a time: reading, the joins and decryption leave the interpreter."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(lambda part: join_bucket(snapshot, view, part, cutoff), parts))


def join_bucket(snapshot: Snapshot, view: ViewSpec, part: Part, cutoff: bool) -> Joined:
    """One bucket's entity rows with their features."""
    bucket, asked = part
    if view.windows is not None:
        events = snapshot.read(bucket, view.windows.read)
        made = aggregate(asked, events, keys=list(snapshot.key_types), windows=view.windows, cutoff=cutoff)
        return Joined(
            frame=made.columns.with_columns(asked[POSITION], made.absent.alias(ABSENT)), hidden=made.hidden
        )
    names = [field.name for field in view.fields]
    ordered = snapshot.is_ordered(bucket)
    features = snapshot.read(bucket, names, sequence=not ordered)
    if features.is_empty():
        nothing = [pl.lit(None).alias(name) for name in names]
        return Joined(frame=asked.select(*nothing, POSITION, pl.lit(True).alias(ABSENT)), hidden=0)
    ttl = None if view.ttl_s is None else dt.timedelta(seconds=view.ttl_s)
    found = answer(
        asked,
        features,
        keys=list(snapshot.key_types),
        columns=names,
        ttl=ttl,
        cutoff=cutoff,
        ordered=ordered,
    )
    return Joined(
        frame=found.columns.with_columns(asked[POSITION], found.absent.alias(ABSENT)), hidden=found.hidden
    )


def event_times(entities: pa.Table) -> pa.ChunkedArray:
    """The entity rows' times as UTC microseconds, rounded down; without a zone they are UTC.

    Raises:
        TrainingSetError: no such column, another type, or a null.
    """
    if EVENT not in entities.column_names:
        raise TrainingSetError(
            f"The entity rows lack '{EVENT}'. They have: {', '.join(entities.column_names)}."
        )
    column = entities[EVENT]
    if not pa.types.is_timestamp(column.type):
        raise TrainingSetError(f"'{EVENT}' of the entity rows must be a timestamp, got {column.type}.")
    if column.null_count:
        raise TrainingSetError(f"'{EVENT}' is null in {column.null_count} entity rows. Give each a time.")
    # A row that is a nanosecond later than the entity row must not be seen, and its time was rounded up.
    return cast_time(column, name=EVENT, rounding=Rounding.down)


def key_column(key: str, kind: str, view: ViewSpec, spec: ServiceSpec, output: pa.Table) -> pa.ChunkedArray:
    """A view's join key: from the entity rows, else from the feature of that name of an earlier view.

    Raises:
        TrainingSetError: neither has it, or its type does not fit.
    """
    earlier = [f"{other.name}__{key}" for other in spec.views[: spec.views.index(view)]]
    there = set(output.column_names)
    name = next((one for one in [key, *reversed(earlier)] if one in there), None)
    if name is None:
        raise TrainingSetError(
            f"View '{view.name}' needs the join key '{key}', which neither the entity rows nor an earlier view of "
            f"service '{spec.name}' has."
        )
    wanted = pa.int64() if kind == "int64" else pa.string()
    try:
        column = output[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not _is_key(column.type, wanted):
            raise pa.ArrowInvalid(f"it is {column.type}")
        keys = column.cast(wanted)
        if (beyond := beyond_range(keys)) is not None and pc.any(beyond).as_py():
            raise pa.ArrowInvalid(f"it must be {kind_of(kind)}")
        return keys
    except pa.ArrowException as error:
        raise TrainingSetError(f"Join key '{key}' must be {wanted}: {error}.") from error


def _is_key(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of a type can be keys: numbers that may be whole, or text; a column of nulls matches nothing."""
    types = pa.types
    if types.is_string(wanted):
        return bool(types.is_null(given) or is_text(given))
    numbers = types.is_integer(given) or types.is_floating(given) or types.is_decimal(given)
    return bool(types.is_null(given) or numbers)
