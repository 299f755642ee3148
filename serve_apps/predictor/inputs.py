"""The model's inputs for a `:predict` request: features that were read, the client's values, and defaults."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InvalidRequest
from feature_jobs.store.catalog.specifications import ServiceSpec
from feature_jobs.store.definitions.missing import Value, fill_online
from feature_jobs.store.on_demand import add_on_demand, transforms_to_run
from feature_jobs.store.online.reader import FeatureReader
from feature_jobs.store.types.dtypes import to_json
from feature_jobs.store.types.status import Status

_ALL_PRESENT = {Status.present}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInputs:
    """The model's inputs for a request's entities."""

    columns: dict[str, list[Any]]
    """From input to a list with one value for each entity. The inputs are in the model's order."""
    status: dict[str, Sequence[str]] = field(default_factory=dict)
    """From input to a list with the status for each entity. Inputs for which all values are present are left out."""
    defaults: dict[str, Value] = field(default_factory=dict)
    """From input to the default that replaces missing and expired values."""
    defaulted: dict[str, list[int]] = field(default_factory=dict)
    """From input to the numbers of the rows that have the default."""


def model_inputs(
    reader: FeatureReader | None,
    wanted: Set[str],
    entities: list[dict[str, Any]],
    overrides: Mapping[str, list[Any]],
    as_of: dt.datetime,
) -> ModelInputs:
    """Read the inputs that the client did not send, by the rules of the feature service.

    Args:
        reader: reader of the model's feature service; None if it has no service.
        wanted: names of the model's inputs, in order.
        entities: join keys of each entity.
        overrides: the client's values, for inputs and for inputs of on-demand transforms.
        as_of: time of the read.

    Raises:
        InvalidRequest: an input cannot be read, and the client did not send it.
        FeatureAbsent: a value is missing or expired, and the feature service does not allow that.
    """
    if reader is None:
        if missing := wanted - overrides.keys():
            raise InvalidRequest(
                f"The model has no feature service. Send input '{min(missing)}' in \"features\"."
            )
        return ModelInputs(columns={name: overrides[name] for name in wanted})
    spec = reader.spec
    vectors = reader.read(entities, as_of)
    defaulted: dict[str, list[int]] = {}
    if spec.missing:
        needed = _needed(spec, wanted, overrides)
        defaulted = fill_online(
            spec.missing, vectors.columns, vectors.status, service=spec.name, needed=needed
        )
    add_on_demand(spec, vectors, overrides, wanted)
    dtypes = spec.dtypes if defaulted else {}
    columns = {name: overrides[name] if name in overrides else vectors.columns[name] for name in wanted}
    read = [name for name in wanted if name not in overrides]
    reported = [*read, *(name for name in defaulted if name not in columns)]
    return ModelInputs(
        columns=columns,
        status={name: vectors.status[name] for name in reported if set(vectors.status[name]) != _ALL_PRESENT},
        defaults={name: to_json([spec.missing.defaults[name]], dtypes[name])[0] for name in defaulted},
        defaulted={name: rows for name, rows in defaulted.items() if name in columns},
    )


def _needed(spec: ServiceSpec, wanted: Collection[str], given: Collection[str]) -> set[str]:
    """Return the columns that the answer depends on: inputs, and the sources of their on-demand transforms."""
    transforms = transforms_to_run(spec, wanted, given)
    sources = {source for transform in transforms for source in transform.sources}
    source_columns = {column for view in spec.views if view.name in sources for column in view.columns}
    return (source_columns | set(wanted)) - set(given)
