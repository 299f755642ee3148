"""What a request says beyond entities: the inputs of on-demand transforms, and the features made of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cluster.runtime import InputSpec
from feature_jobs.store.catalog import ServiceSpec
from feature_jobs.store.on_demand import from_request, load
from feature_jobs.store.online import FeatureVectors, Status


def request_inputs(spec: ServiceSpec) -> dict[str, InputSpec]:
    """What a client may give in "features" beside the model's own inputs.

    Raises:
        DefinitionError: a transform's code is not here, or is not what the model was trained with.
    """
    inputs = {}
    for one in spec.on_demand:
        load(one)
        for field in one.inputs:
            categories = () if field.dtype == "string" else None
            inputs[field.name] = InputSpec(name=field.name, dtype=field.dtype, categories=categories)
    return inputs


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
    made = {column for one in spec.on_demand for column in one.columns}
    if not any(name in made and name not in given for name in wanted):
        return
    for name, values in from_request(spec, given, vectors.columns).items():
        vectors.columns[name] = values
        vectors.status[name] = [Status.null if value is None else Status.present for value in values]
