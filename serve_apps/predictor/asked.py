"""What a request says beyond entities: the inputs of on-demand transforms."""

from __future__ import annotations

from cluster.runtime import InputSpec
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec
from feature_jobs.store.on_demand import load
from feature_jobs.store.types.dtypes import is_rich


def request_inputs(spec: ServiceSpec) -> dict[str, InputSpec | FieldSpec]:
    """What a client may give in "features" beside the model's own inputs.

    Raises:
        DefinitionError: a transform's code is not here, or is not what the model was trained with.
    """
    inputs: dict[str, InputSpec | FieldSpec] = {}
    for one in spec.on_demand:
        load(one)
        for field in one.inputs:
            if is_rich(field.dtype) or field.dtype == "timestamp":
                inputs[field.name] = field
                continue
            categories = () if field.dtype == "string" else None
            inputs[field.name] = InputSpec(name=field.name, dtype=field.dtype, categories=categories)
    return inputs
