"""Build a training set: the point-in-time join over all views of a service, bucket by bucket.

Only the entity rows are hashed, because each view's rows are already in the bucket of their keys. Few rows are joined
in this process, many rows in one Ray task per bucket. `bucket_join.py` describes how much memory a bucket needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import TrainingSetError
from cluster.storage import is_uri
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec
from feature_jobs.store.definitions.missing import fill_offline
from feature_jobs.store.definitions.views import DTYPES
from feature_jobs.store.offline.bucket_join import ABSENT, JoinedBucket, join_bucket
from feature_jobs.store.offline.buckets import bucket_of
from feature_jobs.store.offline.newest_rows import EntityRows, Ints, sort_entities
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.on_demand import append_on_demand
from feature_jobs.store.types.casting import cast_time, is_text
from feature_jobs.store.types.columns import append_columns
from feature_jobs.store.types.instants import Rounding
from feature_jobs.store.types.key_types import describe_key_type, out_of_range
from feature_jobs.store.types.schema import EVENT

THREADS = min(4, os.cpu_count() or 1)
"""Number of buckets that a process joins at the same time."""
REMOTE_THREADS = 4
"""The same for a table in an object store, where threads wait for the network."""
Part = tuple[int, EntityRows]
"""A bucket number, and the entity rows in that bucket."""


JoinParts = Callable[[Snapshot, ViewSpec, list[Part], bool], list[JoinedBucket]]
"""Function that joins buckets of one view; the last argument is the cutoff."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewFeatures:
    """The features of one view for all entity rows, in their order."""

    table: pa.Table
    hidden: int
    """As in `point_in_time.JoinResult`."""
    absent: pa.Array
    """Bool: the entity row has no result, or only an expired one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltTrainingSet:
    """A training set."""

    table: pa.Table
    hidden: dict[str, int]
    """By view, the number of entity rows that have no result only because of the cutoff."""
    absent: dict[str, int]
    """By view, the number of entity rows that have no result, or only an expired one."""


def build(
    spec: ServiceSpec, snapshots: dict[str, Snapshot], entities: pa.Table, *, join_parts: JoinParts
) -> pa.Table:
    """Build the rows of a training set with the cutoff on. The arguments are those of `assemble`."""
    return assemble(spec, snapshots, entities, join_parts=join_parts).table


def assemble(
    spec: ServiceSpec,
    snapshots: dict[str, Snapshot],
    entities: pa.Table,
    *,
    join_parts: JoinParts,
    cutoff: bool = True,
) -> BuiltTrainingSet:
    """Build a training set: the entity rows in their order, with a column `<view>__<feature>` for each feature.

    Args:
        spec: the service.
        snapshots: the pinned table of each view.
        entities: entity rows with join keys, `event_timestamp` and any other columns.
        join_parts: joins the buckets of one view, in this process or in Ray tasks.
        cutoff: whether to hide rows that were created after an entity row's time.

    Raises:
        TrainingSetError: a join key or the timestamp is missing or has the wrong type, or a column has the name of a
            feature.
    """
    joined = join_views(spec, snapshots, entities, join_parts=join_parts, cutoff=cutoff)
    return BuiltTrainingSet(
        table=complete(spec, joined.table, joined.absent),
        hidden=joined.hidden,
        absent={name: absent.true_count for name, absent in joined.absent.items()},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedViews:
    """Entity rows with the features of all views, before defaults and on-demand transforms."""

    table: pa.Table
    hidden: dict[str, int]
    """As in `BuiltTrainingSet`."""
    absent: dict[str, pa.Array]
    """By view, whether each entity row has no result, or only an expired one."""


def join_views(
    spec: ServiceSpec,
    snapshots: dict[str, Snapshot],
    entities: pa.Table,
    *,
    join_parts: JoinParts,
    cutoff: bool = True,
) -> JoinedViews:
    """Join entity rows with the features of all views. Arguments and errors are those of `assemble`."""
    times = event_times(entities)
    present = set(entities.column_names)
    _require_no_features(spec, present)
    output, features, splits = entities, {}, {}
    for view in spec.views:
        snapshot = snapshots[view.name]
        # Views with the same keys use the same split.
        same = (
            (*snapshot.key_types.items(), snapshot.num_buckets)
            if present >= set(snapshot.key_types)
            else view.name
        )
        if same not in splits:
            keys = {
                key: key_column(key, kind, view, spec, output) for key, kind in snapshot.key_types.items()
            }
            requests = pa.table({**keys, EVENT: times})
            splits[same] = split_by_bucket(requests, list(keys), num_buckets=snapshot.num_buckets)
        features[view.name] = join_view(view, snapshot, splits[same], join_parts, cutoff=cutoff)
        columns = zip(view.columns, features[view.name].table.columns, strict=True)
        output = append_columns(output, dict(columns))
    return JoinedViews(
        table=output,
        hidden={name: part.hidden for name, part in features.items()},
        absent={name: part.absent for name, part in features.items()},
    )


def complete(spec: ServiceSpec, table: pa.Table, absent: Mapping[str, pa.Array]) -> pa.Table:
    """Fill defaults into joined rows, and append the columns of on-demand transforms.

    Raises:
        TrainingSetError, DefinitionError: as `append_on_demand`.
    """
    return append_on_demand(spec, fill_offline(spec.missing, table, absent))


def _require_no_features(spec: ServiceSpec, columns: Collection[str]) -> None:
    for name in spec.columns:
        if name in columns:
            raise TrainingSetError(
                f"The entity rows have a column '{name}' already, the name of a feature. Rename it."
            )


def join_view(
    view: ViewSpec,
    snapshot: Snapshot,
    requests: EntityBuckets,
    join_parts: JoinParts,
    *,
    cutoff: bool = True,
) -> ViewFeatures:
    """Join the features of one view with entity rows."""
    joined = join_parts(snapshot, view, requests.parts, cutoff)
    schema = pa.schema([pa.field(field.name, DTYPES[field.dtype]) for field in view.fields])
    if not joined:
        return ViewFeatures(table=schema.empty_table(), hidden=0, absent=pa.array([], pa.bool_()))
    rows = pl.concat([part.frame for part in joined], how="vertical_relaxed", rechunk=True)
    rows = rows[requests.positions]
    return ViewFeatures(
        table=rows.select(schema.names).to_arrow().cast(schema),
        hidden=sum(part.hidden for part in joined),
        absent=rows[ABSENT].to_arrow(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EntityBuckets:
    """Entity rows by bucket."""

    parts: list[Part]
    positions: Ints
    """Position of each entity row among the rows of all parts, one part after another."""


def split_by_bucket(requests: pa.Table, keys: Sequence[str], *, num_buckets: int) -> EntityBuckets:
    """Split entity rows by bucket, and sort each bucket's rows by entity and time."""
    buckets = bucket_of(requests, keys, num_buckets=num_buckets)
    order = np.argsort(buckets, kind="stable")
    frame = pl.DataFrame(pl.from_arrow(requests))[order]
    numbers, starts = np.unique(buckets[order], return_index=True)
    ends = np.append(starts, buckets.size)[1:]
    with ThreadPoolExecutor(THREADS) as threads:
        rows = list(
            threads.map(
                lambda start, end: sort_entities(frame[start:end], keys), starts.tolist(), ends.tolist()
            )
        )
    positions = np.empty(buckets.size, dtype=np.int64)
    for start, part in zip(starts, rows, strict=True):
        positions[order[start + part.order]] = np.arange(start, start + part.order.size)
    return EntityBuckets(
        parts=[(int(bucket), part) for bucket, part in zip(numbers, rows, strict=True)], positions=positions
    )


def join_in_process(
    snapshot: Snapshot, view: ViewSpec, parts: list[Part], cutoff: bool
) -> list[JoinedBucket]:
    """Join the buckets in this process, in threads: reads, joins and decryption release the interpreter lock."""
    with ThreadPoolExecutor(REMOTE_THREADS if is_uri(snapshot.uri) else THREADS) as threads:
        return list(threads.map(lambda part: join_bucket(snapshot, view, part[0], part[1], cutoff), parts))


def event_times(entities: pa.Table) -> pa.ChunkedArray:
    """Return the entity rows' times as UTC microseconds, rounded down. Times without a zone are UTC.

    Raises:
        TrainingSetError: the column is missing, is not a timestamp, or has a null.
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
    # Feature times were rounded up. Rounding down here hides a feature that is one nanosecond later.
    return cast_time(column, name=EVENT, rounding=Rounding.down)


def key_column(key: str, kind: str, view: ViewSpec, spec: ServiceSpec, output: pa.Table) -> pa.ChunkedArray:
    """Return a view's join key: from the entity rows, else from the feature of that name in an earlier view.

    Raises:
        TrainingSetError: the key is in neither of these places, or has the wrong type.
    """
    earlier = [f"{other.name}__{key}" for other in spec.views[: spec.views.index(view)]]
    present = set(output.column_names)
    name = next((candidate for candidate in [key, *reversed(earlier)] if candidate in present), None)
    if name is None:
        raise TrainingSetError(
            f"View '{view.name}' needs the join key '{key}', which neither the entity rows nor an earlier view of "
            f"service '{spec.name}' has."
        )
    key_type = pa.int64() if kind == "int64" else pa.string()
    try:
        column = output[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not _can_be_key(column.type, key_type):
            raise pa.ArrowInvalid(f"it is {column.type}")
        keys = column.cast(key_type)
        if (beyond := out_of_range(keys)) is not None and pc.any(beyond).as_py():
            raise pa.ArrowInvalid(f"it must be {describe_key_type(kind)}")
        return keys
    except pa.ArrowException as error:
        raise TrainingSetError(f"Join key '{key}' must be {key_type}: {error}.") from error


def _can_be_key(dtype: pa.DataType, key_type: pa.DataType) -> bool:
    """Return whether a column can be cast to a key type: text, or numbers. A column of nulls matches nothing."""
    types = pa.types
    if types.is_string(key_type):
        return bool(types.is_null(dtype) or is_text(dtype))
    is_number = types.is_integer(dtype) or types.is_floating(dtype) or types.is_decimal(dtype)
    return bool(types.is_null(dtype) or is_number)
