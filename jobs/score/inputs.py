"""The model's inputs of a chunk: from the feature store by a point-in-time join, or from the rows themselves."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import FalajError, RefusedError, SchemaMismatch, TrainingSetError
from cluster.runtime import InputSpec, ModelSignature
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec
from feature_jobs.store.definitions.missing import view_of
from feature_jobs.store.ingestion.declared_types import Roles, text_column
from feature_jobs.store.offline.bucket_join import JoinedBucket, join_bucket
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.offline.training_set import Part, complete, join_in_process, join_views
from feature_jobs.store.on_demand import transforms_to_run
from feature_jobs.store.types.columns import replace_columns, to_numpy
from feature_jobs.store.types.schema import EVENT
from jobs.score.set_aside import Bools, Reasons, take

_ARROW_TO_DTYPE = {
    "double": "float64",
    "float": "float32",
    "halffloat": "float32",
    "large_string": "string",
    "int8": "int32",
    "int16": "int32",
    "uint8": "int32",
    "uint16": "int32",
    "uint32": "int64",
    "uint64": "int64",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureRead:
    """What is read from the feature store, as plain data that can be sent to workers."""

    spec: ServiceSpec
    """The service, with only the views and transforms that the model needs."""
    snapshots: dict[str, Snapshot]
    """The pinned table of each view."""
    needed: frozenset[str]
    """Columns of views that the inputs depend on."""
    as_of: dt.datetime | None
    """The time of all rows; None means that each row has its own in `event_timestamp`."""

    @property
    def keys(self) -> dict[str, str]:
        """Types of the join keys that the rows must have. Other keys are features of an earlier view."""
        return row_keys(self.spec, self.snapshots)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputPlan:
    """How the inputs of a chunk are made."""

    signature: ModelSignature
    read: FeatureRead | None
    """None if the rows have the inputs."""
    text_types: Mapping[str, str] = field(default_factory=dict)
    """CSV: dtype of each column that is not text."""


@dataclass(frozen=True, slots=True)
class ModelRows:
    """Good rows of a chunk with the model's inputs."""

    positions: np.ndarray
    """Position of each row in the chunk."""
    table: pa.Table


def needed_service(spec: ServiceSpec, wanted: Sequence[str], columns: Collection[str]) -> ServiceSpec:
    """Return the service with only the views and on-demand transforms that some of its columns need.

    Args:
        spec: The service.
        wanted: Columns of the service.
        columns: Columns of the rows. A join key that they lack comes from an earlier view.
    """
    transforms = tuple(transforms_to_run(spec, wanted, ()))
    views = {source for transform in transforms for source in transform.sources}
    views |= {view.name for view in spec.views if not set(view.columns).isdisjoint(wanted)}
    for position in range(len(spec.views) - 1, -1, -1):
        view = spec.views[position]
        if view.name in views:
            views |= {
                other.name
                for other in spec.views[:position]
                for key in view.join_keys
                if key not in columns and f"{other.name}__{key}" in other.columns
            }
    return replace(spec, views=[view for view in spec.views if view.name in views], on_demand=transforms)


def needed_columns(spec: ServiceSpec, wanted: Collection[str]) -> frozenset[str]:
    """Return the views' columns that some inputs depend on, also through on-demand transforms."""
    sources = {source for transform in spec.on_demand for source in transform.sources}
    return frozenset(
        column for view in spec.views for column in view.columns if column in wanted or view.name in sources
    )


def row_keys(spec: ServiceSpec, snapshots: Mapping[str, Snapshot]) -> dict[str, str]:
    """Return the join keys that no earlier view has as a feature, with their types."""
    keys: dict[str, str] = {}
    features: set[str] = set()
    for view in spec.views:
        keys |= {key: kind for key, kind in snapshots[view.name].key_types.items() if key not in features}
        features |= {one.name for one in view.fields}
    return keys


def text_dtype(spec: InputSpec) -> str:
    """Return the feature store's dtype of an input, to parse the text of CSV."""
    dtype = _ARROW_TO_DTYPE.get(spec.dtype, spec.dtype)
    return dtype if spec.length is None else f"list<{dtype}>"


def model_rows(
    table: pa.Table, plan: InputPlan, reasons: Reasons, *, in_task: bool
) -> tuple[pa.Table, ModelRows]:
    """Return the chunk with its columns in their types, and the good rows with the model's inputs.

    Args:
        table: A chunk, as it was read.
        plan: How the inputs are made.
        reasons: Gets the reason of each bad row.
        in_task: Whether this is one of several Ray tasks. It then joins one bucket at a time.

    Raises:
        RefusedError: No row can be scored, because a column is missing or has the wrong type.
        TooManyBadRows: More rows are bad than allowed.
    """
    keys = frozenset() if plan.read is None else frozenset(plan.read.keys)
    table = typed(table, plan.text_types, reasons, keys=keys)
    if plan.read is None:
        positions = np.flatnonzero(reasons.good)
        return table, ModelRows(positions, take(table, positions))
    read = plan.read
    _require_entities(table, read, reasons)
    positions = np.flatnonzero(reasons.good)
    entities = take(table, positions)
    if read.as_of is not None:
        entities = _at(entities, read.as_of)
    joined = join_views(
        read.spec, read.snapshots, entities, join_parts=_join_one_by_one if in_task else join_in_process
    )
    for column in read.spec.missing.refused:
        if column in read.needed:
            absent = to_numpy(joined.absent[view_of(column)], null=False)
            reasons.reject(positions[absent], f"feature '{column}' is missing or expired, and required")
    rows, absent_by_view = joined.table, joined.absent
    left = np.flatnonzero(reasons.good[positions])
    if left.size < positions.size:
        rows, positions = take(rows, left), positions[left]
        absent_by_view = {name: absent.take(pa.array(left)) for name, absent in absent_by_view.items()}
    return table, _completed(read.spec, rows, absent_by_view, positions, reasons)


def _completed(
    spec: ServiceSpec,
    rows: pa.Table,
    absent: Mapping[str, pa.Array],
    positions: np.ndarray,
    reasons: Reasons,
) -> ModelRows:
    """Fill defaults and compute on-demand features. Rows for which a transform fails are set aside."""

    def attempt(start: int, stop: int) -> pa.Table:
        part = {name: mask.slice(start, stop - start) for name, mask in absent.items()}
        return complete(spec, rows.slice(start, stop - start), part)

    try:
        return ModelRows(positions, attempt(0, positions.size))
    except (TrainingSetError, SchemaMismatch):
        if not positions.size:
            raise
    attempt(0, 0)  # a missing column fails for all rows, and also for none
    reasons.reject_failing(
        positions,
        lambda start, stop: _ignore(attempt(start, stop)),
        TrainingSetError,
        SchemaMismatch,
        reason=lambda _: "an on-demand transform failed",
    )
    left = np.flatnonzero(reasons.good[positions])
    rows = take(rows, left)
    absent = {name: mask.take(pa.array(left)) for name, mask in absent.items()}
    return ModelRows(positions[left], complete(spec, rows, absent))


def _ignore(_: object) -> None:
    """Do nothing with a result."""


def _require_entities(table: pa.Table, read: FeatureRead, reasons: Reasons) -> None:
    """Set aside rows without a join key or a time."""
    for name in [*read.keys, *([EVENT] if read.as_of is None else [])]:
        if name in table.column_names:
            column = table[name]
            missing = to_numpy(column.is_null())
            if pa.types.is_floating(column.type):
                missing = missing | to_numpy(pc.fill_null(pc.is_nan(column), False))
            reasons.reject(np.flatnonzero(missing), f"'{name}' is missing")


def _at(entities: pa.Table, time: dt.datetime) -> pa.Table:
    column = pa.repeat(pa.scalar(time, pa.timestamp("us", "UTC")), entities.num_rows)
    if EVENT in entities.column_names:
        return replace_columns(entities, {EVENT: pa.chunked_array([column])})
    return entities.append_column(EVENT, column)


def _join_one_by_one(
    snapshot: Snapshot, view: ViewSpec, parts: list[Part], cutoff: bool
) -> list[JoinedBucket]:
    """Join one bucket after another, because several tasks run at the same time."""
    return [join_bucket(snapshot, view, bucket, entities, cutoff) for bucket, entities in parts]


def typed(table: pa.Table, types: Mapping[str, str], reasons: Reasons, *, keys: frozenset[str]) -> pa.Table:
    """Convert text columns to their types. Rows with a value of another form are set aside, and get null there."""
    rows = np.arange(table.num_rows)
    columns: dict[str, pa.ChunkedArray] = {}
    for name, dtype in types.items():
        if name not in table.column_names:
            continue
        column = table[name]
        if name == EVENT:  # times of rows are rounded down, so that a later feature stays hidden
            column = pc.replace_substring_regex(column, r"(\.\d{6})\d+", r"\1")
        parse = functools.partial(text_column, dtype=dtype, name=name, roles=Roles(keys=keys))
        try:
            columns[name] = parse(column)
        except SchemaMismatch:
            before = reasons.good
            reasons.reject_failing(
                rows[before],
                _attempt(parse, column.filter(pa.array(before))),
                RefusedError,
                reason=functools.partial(_not_a, name, dtype),
            )
            columns[name] = parse(_null_where(column, ~reasons.good))
    return replace_columns(table, columns)


def _not_a(name: str, dtype: str, _: FalajError) -> str:
    return f"'{name}' is not {dtype}"


def _attempt(parse: functools.partial[pa.ChunkedArray], column: pa.ChunkedArray) -> functools.partial[None]:
    return functools.partial(_parse_slice, parse, column)


def _parse_slice(
    parse: functools.partial[pa.ChunkedArray], column: pa.ChunkedArray, start: int, stop: int
) -> None:
    parse(column.slice(start, stop - start))


def _null_where(column: pa.ChunkedArray, mask: Bools) -> pa.ChunkedArray:
    return pc.if_else(pa.array(mask), pa.scalar(None, column.type), column)
