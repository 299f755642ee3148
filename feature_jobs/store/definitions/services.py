"""What a model reads: the views of a feature service, and what is made of them when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from cluster.errors import DefinitionError
from feature_jobs.store.definitions.missing import Choice, Missing, definition
from feature_jobs.store.definitions.names import LONGEST_NAME, Named, refuse_alike, refuse_reserved
from feature_jobs.store.definitions.views import (
    FeatureView,
    Field,
    Transform,
    check_name,
    code_definition,
    content_hash,
    field_definition,
)


@dataclass(frozen=True, slots=True, eq=False)
class OnDemandTransform:
    """Features that are made when they are asked for, from what a request says and the features of views.

    The transform gets a table with a column for each input and `<view>__<feature>` for each feature of its sources, and
    gives one with the columns of the schema, in any order, a row for a row. Training and serving call the same
    function; a training set takes the inputs from the entity rows.
    """

    name: str
    _: KW_ONLY
    inputs: Sequence[Field]
    """What a request says."""
    sources: Sequence[FeatureView] = ()
    schema: Sequence[Field]
    transform: Transform

    def __post_init__(self) -> None:
        check_name("On-demand transform", self.name)
        what = f"On-demand transform '{self.name}'"
        if "__" in self.name:
            raise DefinitionError(f"{what}: '__' is kept for '<view>__<feature>'.")
        for name in ("inputs", "sources", "schema"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.inputs or not self.schema:
            raise DefinitionError(f"{what} needs inputs and a schema. Without inputs, write a FeatureView.")
        refuse_alike(what, [Named("field", field.name) for field in self.schema])
        inputs = [Named("field", field.name) for field in self.inputs]
        refuse_alike(what, inputs)
        for one in inputs:
            refuse_reserved(what, one)
            if "__" in one.name:
                raise DefinitionError(f"{what}: the input name '{one.name}' is kept for the platform.")

    def definition(self) -> dict[str, Any]:
        """The whole definition as JSON; its hash covers the transform's code."""
        return {
            "name": self.name,
            "inputs": [field_definition(field) for field in self.inputs],
            "sources": [view.name for view in self.sources],
            "schema": [field_definition(field) for field in self.schema],
            "transform": code_definition(self.transform),
        }


@dataclass(frozen=True, slots=True, eq=False)
class FeatureService:
    """The features one model reads: views, in order, then what is made of them on demand.

    A join key that the entity rows lack is taken from the feature of the same name of an earlier view.
    """

    name: str
    _: KW_ONLY
    views: Sequence[FeatureView]
    on_demand: Sequence[OnDemandTransform] = ()
    missing: Missing | Mapping[str, Choice] = Missing.NULL
    """What becomes of a value that is missing or expired: for all features, or by view or `<view>__<feature>`."""

    def __post_init__(self) -> None:
        check_name("Feature service", self.name, longest=LONGEST_NAME)
        object.__setattr__(self, "views", tuple(self.views))
        object.__setattr__(self, "on_demand", tuple(self.on_demand))
        if not self.views:
            raise DefinitionError(f"Feature service '{self.name}' has no view.")
        names = [Named("view", view.name) for view in self.views]
        made = [Named("on-demand transform", one.name) for one in self.on_demand]
        refuse_alike(f"Feature service '{self.name}'", names + made)
        self._check_keys()
        self._check_on_demand()
        self.missing_definition()

    @property
    def version(self) -> str:
        """Content hash of the name, the views' versions in order, the on-demand transforms, and what becomes of missing
        values: 12 hex digits."""
        parts: dict[str, Any] = {
            "name": self.name,
            "views": [[view.name, view.version] for view in self.views],
        }
        if self.on_demand:
            parts["on_demand"] = [one.definition() for one in self.on_demand]
        if missing := self.missing_definition():
            parts["missing"] = missing
        return content_hash(parts)

    def missing_definition(self) -> dict[str, dict[str, Any]]:
        """What becomes of missing values as JSON; empty where all become null.

        Raises:
            DefinitionError: an unknown feature, or a default that does not fit.
        """
        return definition(self.name, self.missing, {view.name: view.features for view in self.views})

    def _check_keys(self) -> None:
        """One entity row gives a key to all views, so its type is the same in all that declare one."""
        declared: dict[str, tuple[str, FeatureView]] = {}
        for view in self.views:
            for key, dtype in view.key_types.items():
                first, other = declared.setdefault(key, (dtype, view))
                if first != dtype:
                    raise DefinitionError(
                        f"Feature service '{self.name}': join key '{key}' is {first} in view '{other.name}' and "
                        f"{dtype} in view '{view.name}'. Declare one type."
                    )

    def _check_on_demand(self) -> None:
        versions = {view.name: view.version for view in self.views} if self.on_demand else {}
        inputs: dict[str, str] = {}
        for one in self.on_demand:
            for view in one.sources:
                if versions.get(view.name) != view.version:
                    raise DefinitionError(
                        f"On-demand transform '{one.name}' reads the view '{view.name}', which feature service "
                        f"'{self.name}' does not have. Add it to views=[…]."
                    )
            for field in one.inputs:
                if inputs.setdefault(field.name, field.dtype) != field.dtype:
                    raise DefinitionError(
                        f"Feature service '{self.name}': input '{field.name}' has two dtypes, "
                        f"{inputs[field.name]} and {field.dtype}."
                    )
        refuse_alike(f"Feature service '{self.name}'", [Named("input", name) for name in inputs])
