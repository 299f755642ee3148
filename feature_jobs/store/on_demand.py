"""Run on-demand transforms: the same function over Arrow tables in training and in serving.

The ledger contains the hash of a transform's code, not the code itself. Before a transform runs, its module is imported
and the hash is compared. Other code is refused, because a model must be served with the function from its training.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError, InvalidRequest, SchemaMismatch, TrainingSetError
from feature_jobs.store.catalog.specifications import FieldSpec, OnDemandSpec, ServiceSpec
from feature_jobs.store.definitions.modules import import_module
from feature_jobs.store.definitions.source_code import source_code
from feature_jobs.store.definitions.views import DTYPES, Transform
from feature_jobs.store.types.casting import cast_feature, list_faults
from feature_jobs.store.types.columns import append_columns, replace_columns
from feature_jobs.store.types.dtypes import list_of, online_values, to_arrow
from feature_jobs.store.types.status import FeatureVectors, Status


def append_on_demand(spec: ServiceSpec, table: pa.Table) -> pa.Table:
    """Append the columns of a service's on-demand transforms.

    Args:
        spec: The service.
        table: Rows with the transforms' inputs and the features of the service's views.

    Raises:
        TrainingSetError: An input is missing or has the wrong type, or a transform fails.
        DefinitionError: The transform's module cannot be imported, or its code differs from the applied code.
    """
    for transform in spec.on_demand:
        available = set(table.column_names)
        for field in transform.inputs:
            if field.name not in available:
                raise TrainingSetError(
                    f"The entity rows lack '{field.name}' ({field.dtype}), an input of on-demand transform "
                    f"'{transform.name}'. Add the values that requests will have."
                )
        try:
            computed = compute(transform, table, service=spec)
        except SchemaMismatch as error:
            raise TrainingSetError(str(error)) from error
        table = append_columns(table, dict(zip(transform.columns, computed.columns, strict=True)))
    return table


def from_request(
    spec: ServiceSpec, inputs: Mapping[str, Sequence[Any]], features: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
    """Compute the columns of a service's on-demand transforms for a request.

    Args:
        spec: The service.
        inputs: The request's inputs, one value per entity.
        features: `<view>__<feature>` to values of the online store, one per entity.

    Returns:
        `<transform>__<feature>` to one value per entity, as in the online store.

    Raises:
        InvalidRequest: An input is missing or has the wrong type, or a transform fails.
    """
    columns: dict[str, list[Any]] = {}
    dtypes = spec.dtypes
    for transform in spec.on_demand:
        dtypes |= {field.name: field.dtype for field in transform.inputs}
        if missing := [field.name for field in transform.inputs if field.name not in inputs]:
            raise InvalidRequest(
                f"Input '{missing[0]}' is missing, which '{transform.name}' needs. Give it in \"features\"."
            )
        names = _source_columns(transform, spec)
        try:
            arrays = {name: to_arrow({**features, **inputs}[name], dtypes[name]) for name in names}
            computed = compute(transform, pa.table(arrays), service=spec)
        except (SchemaMismatch, TrainingSetError, ValueError, pa.ArrowException, TypeError) as error:
            raise InvalidRequest(
                f"'{transform.name}' cannot be computed from the request's values: {error}"
            ) from error
        columns |= {
            name: online_values(column, field.dtype)
            for name, field, column in zip(transform.columns, transform.fields, computed.columns, strict=True)
        }
    return columns


def add_on_demand(
    spec: ServiceSpec,
    vectors: FeatureVectors,
    given: Mapping[str, Sequence[Any]],
    wanted: Collection[str],
) -> None:
    """Add the columns of on-demand transforms to features that were read online.

    Nothing is added if the request itself gives all wanted on-demand columns.

    Args:
        spec: The service.
        vectors: The features. Changed in place.
        given: The request's inputs, and the features that the request gives itself.
        wanted: Names of the columns that are needed.

    Raises:
        InvalidRequest: An input is missing or has the wrong type, or a transform fails.
    """
    if not transforms_to_run(spec, wanted, given):
        return
    for name, values in from_request(spec, given, vectors.columns).items():
        vectors.columns[name] = values
        vectors.status[name] = [Status.null if value is None else Status.present for value in values]


def transforms_to_run(
    spec: ServiceSpec, wanted: Collection[str], given: Collection[str]
) -> list[OnDemandSpec]:
    """Return the transforms with a column that is wanted and that the request does not give itself."""
    return [
        transform
        for transform in spec.on_demand
        if any(name in wanted and name not in given for name in transform.columns)
    ]


def compute(transform: OnDemandSpec, table: pa.Table, *, service: ServiceSpec) -> pa.Table:
    """Run a transform. Return its columns in the order and with the types of its schema.

    Raises:
        SchemaMismatch: An input or an output has the wrong type, or an output is missing.
        TrainingSetError: The transform failed, or returned another number of rows.
    """
    inputs = {field.name: _cast(table[field.name], field) for field in transform.inputs}
    arguments = replace_columns(table.select(_source_columns(transform, service)), inputs)
    try:
        result = load_transform(transform)(arguments)
    except DefinitionError:
        raise
    except Exception as error:
        raise TrainingSetError(
            f"On-demand transform '{transform.name}' failed: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(result, pa.Table) or result.num_rows != table.num_rows:
        raise TrainingSetError(
            f"On-demand transform '{transform.name}' must return a table with one row for each input row."
        )
    columns, available = {}, set(result.column_names)
    for field in transform.fields:
        if field.name not in available:
            raise SchemaMismatch(f"On-demand transform '{transform.name}' returned no column '{field.name}'.")
        columns[field.name] = _cast(result[field.name], field)
    return pa.table(columns)


def _cast(column: pa.ChunkedArray, field: FieldSpec) -> pa.ChunkedArray:
    """Cast a column to its field's dtype. Raise SchemaMismatch if it does not fit."""
    cast_column = cast_feature(column, DTYPES[field.dtype], name=field.name)
    if (list_type := list_of(field.dtype)) is not None:
        for fault, failing in list_faults(cast_column, list_type.length):
            if pc.any(failing).as_py():
                raise SchemaMismatch(f"Column '{field.name}' should be {field.dtype}: a list {fault}.")
    return cast_column


@functools.lru_cache(maxsize=256)
def load_transform(transform: OnDemandSpec) -> Transform:
    """Import a transform's function.

    Raises:
        DefinitionError: Its module cannot be imported, or its code differs from the applied code.
    """
    module, _, name = transform.function.partition(":")
    try:
        function = functools.reduce(getattr, name.split("."), cast(Any, import_module(module)))
    except AttributeError as error:
        raise DefinitionError(
            f"Module '{module}' has no '{name}', the code of on-demand transform '{transform.name}'. Restore the code "
            "that was applied."
        ) from error
    sha256 = hashlib.sha256(source_code(function).encode()).hexdigest()
    if sha256 != transform.sha256:
        raise DefinitionError(
            f"The code of on-demand transform '{transform.name}' ({transform.function}) is not the applied code: its "
            f"hash is {sha256[:8]}, not {transform.sha256[:8]}. Restore the applied code, or give the new function "
            "another name."
        )
    return cast(Transform, function)


def _source_columns(transform: OnDemandSpec, service: ServiceSpec) -> list[str]:
    """Return the columns that the transform reads: its inputs, then the features of its sources."""
    features = [column for view in service.views if view.name in transform.sources for column in view.columns]
    return [*(field.name for field in transform.inputs), *features]
