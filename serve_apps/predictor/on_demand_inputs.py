"""Inputs of on-demand transforms that a client can send in "features"."""

from __future__ import annotations

from cluster.runtime import InputSpec
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec
from feature_jobs.store.on_demand import load_transform
from feature_jobs.store.types.dtypes import is_rich


def on_demand_inputs(spec: ServiceSpec) -> dict[str, InputSpec | FieldSpec]:
    """Return by name the inputs that a service's on-demand transforms read from the request.

    Raises:
        DefinitionError: the code of a transform is missing, or is not the code that the model was trained with.
    """
    inputs: dict[str, InputSpec | FieldSpec] = {}
    for transform in spec.on_demand:
        load_transform(transform)
        for field in transform.inputs:
            if is_rich(field.dtype) or field.dtype == "timestamp":
                inputs[field.name] = field
                continue
            categories = () if field.dtype == "string" else None
            inputs[field.name] = InputSpec(name=field.name, dtype=field.dtype, categories=categories)
    return inputs
