"""Feature services and on-demand transforms: the features that one model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from cluster.errors import DefinitionError
from feature_jobs.store.definitions.missing import Choice, Missing, policy_definition
from feature_jobs.store.definitions.names import (
    LONGEST_NAME,
    Named,
    require_distinct_names,
    require_not_reserved,
    validate_name,
)
from feature_jobs.store.definitions.views import (
    FeatureView,
    Field,
    Transform,
    code_definition,
    content_hash,
    field_definition,
)


@dataclass(frozen=True, slots=True, eq=False)
class OnDemandTransform:
    """Features that are computed per request, from inputs in the request and from features of views.

    The transform takes a table with one column per input, and one column `<view>__<feature>` per feature of its
    sources. For the same rows, it returns a table with the columns of the schema, in any order. Training and serving
    call the same function. For a training set, the inputs are columns of the entity rows.
    """

    name: str
    _: KW_ONLY
    inputs: Sequence[Field]
    """Values that the request provides."""
    sources: Sequence[FeatureView] = ()
    schema: Sequence[Field]
    transform: Transform

    def __post_init__(self) -> None:
        validate_name("On-demand transform", self.name)
        owner = f"On-demand transform '{self.name}'"
        if "__" in self.name:
            raise DefinitionError(f"{owner}: '__' is reserved for '<view>__<feature>'.")
        for name in ("inputs", "sources", "schema"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.inputs or not self.schema:
            raise DefinitionError(f"{owner} needs inputs and a schema. Without inputs, write a FeatureView.")
        require_distinct_names(owner, [Named("field", field.name) for field in self.schema])
        inputs = [Named("field", field.name) for field in self.inputs]
        require_distinct_names(owner, inputs)
        for column in inputs:
            require_not_reserved(owner, column)
            if "__" in column.name:
                raise DefinitionError(
                    f"{owner}: the input name '{column.name}' is reserved for the platform."
                )

    def definition(self) -> dict[str, Any]:
        """Return the definition as JSON. It includes the hash of the transform's code."""
        return {
            "name": self.name,
            "inputs": [field_definition(field) for field in self.inputs],
            "sources": [view.name for view in self.sources],
            "schema": [field_definition(field) for field in self.schema],
            "transform": code_definition(self.transform),
        }


@dataclass(frozen=True, slots=True, eq=False)
class FeatureService:
    """The features that one model reads: first the views' features, in order, then the on-demand features.

    If the entity rows lack a join key, the feature with the same name in an earlier view is used.
    """

    name: str
    _: KW_ONLY
    views: Sequence[FeatureView]
    on_demand: Sequence[OnDemandTransform] = ()
    missing: Missing | Mapping[str, Choice] = Missing.NULL
    """Policy for missing and expired values: for all features, or by view or `<view>__<feature>`."""

    def __post_init__(self) -> None:
        validate_name("Feature service", self.name, longest=LONGEST_NAME)
        object.__setattr__(self, "views", tuple(self.views))
        object.__setattr__(self, "on_demand", tuple(self.on_demand))
        if not self.views:
            raise DefinitionError(f"Feature service '{self.name}' has no view.")
        views = [Named("view", view.name) for view in self.views]
        transforms = [Named("on-demand transform", transform.name) for transform in self.on_demand]
        require_distinct_names(f"Feature service '{self.name}'", views + transforms)
        self._check_keys()
        self._check_on_demand()
        self.missing_definition()

    @property
    def version(self) -> str:
        """Hash of the service in 12 hex digits: its name, the views' versions in order, the on-demand transforms, and
        the policies for missing values."""
        parts: dict[str, Any] = {
            "name": self.name,
            "views": [[view.name, view.version] for view in self.views],
        }
        if self.on_demand:
            parts["on_demand"] = [transform.definition() for transform in self.on_demand]
        if missing := self.missing_definition():
            parts["missing"] = missing
        return content_hash(parts)

    def missing_definition(self) -> dict[str, dict[str, Any]]:
        """Return the policies for missing values as JSON. It is empty if all missing values become null.

        Raises:
            DefinitionError: A feature is unknown, or a default does not fit its feature.
        """
        return policy_definition(self.name, self.missing, {view.name: view.features for view in self.views})

    def _check_keys(self) -> None:
        """Check that all views which declare a type for a join key declare the same type.

        An entity row has one value for a key, and all views read this value.
        """
        first_views: dict[str, FeatureView] = {}
        for view in self.views:
            for key, dtype in view.key_types.items():
                first_view = first_views.setdefault(key, view)
                first_dtype = first_view.key_types[key]
                if first_dtype != dtype:
                    raise DefinitionError(
                        f"Feature service '{self.name}': join key '{key}' is {first_dtype} in view "
                        f"'{first_view.name}' and {dtype} in view '{view.name}'. Declare one type."
                    )

    def _check_on_demand(self) -> None:
        versions = {view.name: view.version for view in self.views} if self.on_demand else {}
        inputs: dict[str, str] = {}
        for transform in self.on_demand:
            for view in transform.sources:
                if versions.get(view.name) != view.version:
                    raise DefinitionError(
                        f"On-demand transform '{transform.name}' reads the view '{view.name}', which feature service "
                        f"'{self.name}' does not have. Add it to views=[…]."
                    )
            for field in transform.inputs:
                if inputs.setdefault(field.name, field.dtype) != field.dtype:
                    raise DefinitionError(
                        f"Feature service '{self.name}': input '{field.name}' has two dtypes, "
                        f"{inputs[field.name]} and {field.dtype}."
                    )
        require_distinct_names(f"Feature service '{self.name}'", [Named("input", name) for name in inputs])
