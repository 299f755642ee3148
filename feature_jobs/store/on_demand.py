"""On-demand transforms at work: the same function over Arrow in training and in serving.

Its code is not in the ledger, only its hash. Whoever calls it imports the module that it was applied from and refuses
other code than that which was applied: a model must not be served with another function than it was trained with.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import DefinitionError, InvalidRequest, SchemaMismatch, TrainingSetError
from feature_jobs.store.catalog.specifications import FieldSpec, OnDemandSpec, ServiceSpec, import_module
from feature_jobs.store.definitions.source_code import source_code
from feature_jobs.store.definitions.views import DTYPES, Transform
from feature_jobs.store.types.casting import cast_feature, misfits
from feature_jobs.store.types.columns import with_appended, with_replaced
from feature_jobs.store.types.dtypes import arrow_values, list_of, online_values
from feature_jobs.store.types.status import FeatureVectors, Status


def with_on_demand(spec: ServiceSpec, table: pa.Table) -> pa.Table:
    """Rows with the columns of a service's on-demand transforms; inputs and views' features are among its columns.

    Raises:
        TrainingSetError: an input is missing or has the wrong type, or a transform fails.
        DefinitionError: its code is not here, or is another.
    """
    for one in spec.on_demand:
        there = set(table.column_names)
        for field in one.inputs:
            if field.name not in there:
                raise TrainingSetError(
                    f"The entity rows lack '{field.name}' ({field.dtype}), an input of on-demand transform "
                    f"'{one.name}'. Give what requests will say."
                )
        try:
            made = compute(one, table, service=spec)
        except SchemaMismatch as error:
            raise TrainingSetError(str(error)) from error
        table = with_appended(table, dict(zip(one.columns, made.columns, strict=True)))
    return table


def from_request(
    spec: ServiceSpec, given: Mapping[str, Sequence[Any]], features: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
    """The columns of a service's on-demand transforms, one value an entity.

    Args:
        spec: the service.
        given: inputs that the request says.
        features: `<view>__<feature>` as the online store has them; a time in microseconds.

    Raises:
        InvalidRequest: an input is missing or has the wrong type, or the transform cannot work with it.
    """
    columns: dict[str, list[Any]] = {}
    dtypes = spec.dtypes
    for one in spec.on_demand:
        dtypes |= {field.name: field.dtype for field in one.inputs}
        if missing := [field.name for field in one.inputs if field.name not in given]:
            raise InvalidRequest(
                f"Input '{missing[0]}' is missing, which '{one.name}' is made of. Give it in \"features\"."
            )
        wanted = _read(one, spec)
        try:
            arrays = {name: arrow_values({**features, **given}[name], dtypes[name]) for name in wanted}
            made = compute(one, pa.table(arrays), service=spec)
        except (SchemaMismatch, TrainingSetError, ValueError, pa.ArrowException, TypeError) as error:
            raise InvalidRequest(f"'{one.name}' cannot be made of what is given: {error}") from error
        columns |= {
            name: online_values(column, field.dtype)
            for name, field, column in zip(one.columns, one.fields, made.columns, strict=True)
        }
    return columns


def add_on_demand(
    spec: ServiceSpec,
    vectors: FeatureVectors,
    given: Mapping[str, Sequence[Any]],
    wanted: Collection[str],
) -> None:
    """Put the columns that are made on demand beside those that were read, where they are wanted and not given.

    Raises:
        InvalidRequest: an input is missing, or the transform cannot work with it.
    """
    if not made_on_demand(spec, wanted, given):
        return
    for name, values in from_request(spec, given, vectors.columns).items():
        vectors.columns[name] = values
        vectors.status[name] = [Status.null if value is None else Status.present for value in values]


def made_on_demand(spec: ServiceSpec, wanted: Collection[str], given: Collection[str]) -> list[OnDemandSpec]:
    """The transforms of which a column is wanted that is not given."""
    return [
        one for one in spec.on_demand if any(name in wanted and name not in given for name in one.columns)
    ]


def compute(one: OnDemandSpec, table: pa.Table, *, service: ServiceSpec) -> pa.Table:
    """The transform's columns, in the order and with the types of its schema.

    Raises:
        SchemaMismatch: an input or an output is not what it should be.
        TrainingSetError: it failed, or gave another number of rows.
    """
    asked = with_replaced(
        table.select(_read(one, service)),
        {field.name: _fitting(table[field.name], field) for field in one.inputs},
    )
    try:
        made = load(one)(asked)
    except DefinitionError:
        raise
    except Exception as error:
        raise TrainingSetError(
            f"On-demand transform '{one.name}' failed: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(made, pa.Table) or made.num_rows != table.num_rows:
        raise TrainingSetError(f"On-demand transform '{one.name}' must give a table with a row for each row.")
    columns, there = {}, set(made.column_names)
    for field in one.fields:
        if field.name not in there:
            raise SchemaMismatch(f"On-demand transform '{one.name}' gave no column '{field.name}'.")
        columns[field.name] = _fitting(made[field.name], field)
    return pa.table(columns)


def _fitting(column: pa.ChunkedArray, field: FieldSpec) -> pa.ChunkedArray:
    """A column as its field declares it."""
    cast = cast_feature(column, DTYPES[field.dtype], name=field.name)
    if (wanted := list_of(field.dtype)) is not None:
        for said, failing in misfits(cast, wanted.length):
            if pc.any(failing).as_py():
                raise SchemaMismatch(f"Column '{field.name}' should be {field.dtype}: a list {said}.")
    return cast


@functools.lru_cache(maxsize=256)
def load(one: OnDemandSpec) -> Transform:
    """The transform's function.

    Raises:
        DefinitionError: its module cannot be imported here, or its code is not what was applied.
    """
    module, _, name = one.function.partition(":")
    try:
        function = functools.reduce(getattr, name.split("."), cast(Any, import_module(module)))
    except AttributeError as error:
        raise DefinitionError(
            f"Module '{module}' has no '{name}', the code of on-demand transform '{one.name}'. Put the code here that "
            "was applied."
        ) from error
    found = hashlib.sha256(source_code(function).encode()).hexdigest()
    if found != one.sha256:
        raise DefinitionError(
            f"The code of on-demand transform '{one.name}' ({one.function}) is not what was applied: its hash is "
            f"{found[:8]}, not {one.sha256[:8]}. Put the applied code here, or give the new one another name."
        )
    return cast(Transform, function)


def _read(one: OnDemandSpec, service: ServiceSpec) -> list[str]:
    """The columns that the transform gets: its inputs, then the features of its sources."""
    features = [column for view in service.views if view.name in one.sources for column in view.columns]
    return [*(field.name for field in one.inputs), *features]
