"""What the model is given for a request of `:predict`: what was read, what the client gave, what stands in."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InvalidRequest
from feature_jobs.store.catalog.specifications import ServiceSpec
from feature_jobs.store.definitions.missing import Value, settle
from feature_jobs.store.on_demand import add_on_demand, made_on_demand
from feature_jobs.store.online.reader import FeatureReader
from feature_jobs.store.types.dtypes import to_json
from feature_jobs.store.types.status import Status

_WHOLE = {Status.present}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInputs:
    """The inputs of some entities."""

    columns: dict[str, list[Any]]
    """In the model's order, one value an entity."""
    status: dict[str, Sequence[str]] = field(default_factory=dict)
    """Of those that were read and are not all present."""
    defaults: dict[str, Value] = field(default_factory=dict)
    """What was put in where these are missing or expired."""
    defaulted: dict[str, list[int]] = field(default_factory=dict)
    """In which rows, of the model's own inputs."""


def model_inputs(
    reader: FeatureReader | None,
    wanted: Set[str],
    entities: list[dict[str, Any]],
    overrides: Mapping[str, list[Any]],
    as_of: dt.datetime,
) -> ModelInputs:
    """Read what the client did not give, as the feature service says.

    Args:
        reader: of the model's feature service; none where it has none.
        wanted: the model's inputs, in order.
        entities: keys.
        overrides: what the client gave, for inputs and for what on-demand transforms are made of.
        as_of: the moment.

    Raises:
        InvalidRequest: something is not given that cannot be read.
        FeatureAbsent: a value is missing or expired that the feature service does not let be.
    """
    if reader is None:
        if missing := wanted - overrides.keys():
            raise InvalidRequest(
                f"The model has no feature service: give input '{min(missing)}' in \"features\"."
            )
        return ModelInputs(columns={name: overrides[name] for name in wanted})
    spec = reader.spec
    vectors = reader.read(entities, as_of)
    defaulted: dict[str, list[int]] = {}
    if spec.missing:
        needed = _needed(spec, wanted, overrides)
        defaulted = settle(spec.missing, vectors.columns, vectors.status, service=spec.name, needed=needed)
    add_on_demand(spec, vectors, overrides, wanted)
    dtypes = spec.dtypes if defaulted else {}
    columns = {name: overrides[name] if name in overrides else vectors.columns[name] for name in wanted}
    read = [name for name in wanted if name not in overrides]
    shown = [*read, *(name for name in defaulted if name not in columns)]
    return ModelInputs(
        columns=columns,
        status={name: vectors.status[name] for name in shown if set(vectors.status[name]) != _WHOLE},
        defaults={name: to_json([spec.missing.defaults[name]], dtypes[name])[0] for name in defaulted},
        defaulted={name: rows for name, rows in defaulted.items() if name in columns},
    )


def _needed(spec: ServiceSpec, wanted: Collection[str], given: Collection[str]) -> set[str]:
    """The columns of views that the answer rests on: inputs, and what those made on demand are made of."""
    sources = {source for one in made_on_demand(spec, wanted, given) for source in one.sources}
    of_views = {column for view in spec.views if view.name in sources for column in view.columns}
    return (of_views | set(wanted)) - set(given)
