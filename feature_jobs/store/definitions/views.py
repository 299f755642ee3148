"""Definitions of entities, fields and feature views: plain objects in any importable module.

A definition is validated when it is created, so every existing definition can be applied. A view's version is a hash of
its whole definition and of its transform's source, so the ledger shows which code made a row. Governance fields
(sensitivity, owner, purposes, region, retention, subject key) are part of the definition.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from typing import Any

import pyarrow as pa

from cluster.errors import DefinitionError, did_you_mean
from cluster.ledger.chain import canonical
from feature_jobs.store.definitions.aggregations import Aggregation, WindowSpec, window_spec
from feature_jobs.store.definitions.checks import Check, RowCheck
from feature_jobs.store.definitions.limits import CENTURY, validate_span
from feature_jobs.store.definitions.names import (
    LONGEST_NAME,
    Named,
    require_distinct_names,
    require_not_reserved,
    validate_name,
)
from feature_jobs.store.definitions.source_code import source_code
from feature_jobs.store.definitions.sources import DTYPES as DTYPES
from feature_jobs.store.definitions.sources import FileSource as FileSource
from feature_jobs.store.definitions.sources import Source
from feature_jobs.store.types.dtypes import canonical_dtype, is_rich
from feature_jobs.store.types.key_types import validate_key_types

Transform = Callable[[pa.Table], pa.Table]
"""A pure function over Arrow tables that keeps the number and order of rows."""


class Sensitivity(enum.StrEnum):
    """How a column must be protected."""

    PUBLIC = "public"
    INTERNAL = "internal"
    PERSONAL = "personal"
    SENSITIVE = "sensitive"


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing that features describe, and the columns that identify it."""

    name: str
    _: KW_ONLY
    join_keys: Sequence[str] | Mapping[str, str]
    """The columns' names, or name to type ("int64" or "string"). All writers and readers must use declared types."""
    key_types: Mapping[str, str] = field(init=False, hash=False)
    """The declared types. Empty if no types are declared."""

    def __post_init__(self) -> None:
        validate_name("Entity", self.name)
        owner, keys = f"Entity '{self.name}'", self.join_keys
        types = validate_key_types(owner, keys) if isinstance(keys, Mapping) else {}
        names = list(keys) if isinstance(keys, Mapping) else keys
        object.__setattr__(self, "key_types", types)
        object.__setattr__(self, "join_keys", _names(owner, "join_keys", names))
        if not self.join_keys:
            raise DefinitionError(f"Entity '{self.name}' has no join key. Give join_keys=['…'].")
        for key in self.join_keys:
            validate_name(f"Join key of entity '{self.name}'", key)


@dataclass(frozen=True, slots=True)
class Field:
    """A feature, which is a column of a view."""

    name: str
    dtype: str
    _: KW_ONLY
    sensitivity: Sensitivity = Sensitivity.INTERNAL
    categorical: bool = False
    """Whether the values are codes without an order."""
    description: str = ""
    from_columns: Sequence[str] = ()
    """Source columns from which the transform computes the feature, for lineage. Empty means all source columns."""

    def __post_init__(self) -> None:
        validate_name("Field", self.name)
        if self.dtype not in DTYPES:
            raise DefinitionError(
                f"Field '{self.name}' has the unknown dtype '{self.dtype}'.{did_you_mean(self.dtype, DTYPES)}"
            )
        object.__setattr__(self, "dtype", canonical_dtype(self.dtype))
        if self.categorical and is_rich(self.dtype):
            raise DefinitionError(
                f"Field '{self.name}' is {self.dtype}, which has no categories. Remove categorical=True."
            )
        object.__setattr__(self, "sensitivity", Sensitivity(self.sensitivity))
        columns = _names(f"Field '{self.name}'", "from_columns", self.from_columns)
        object.__setattr__(self, "from_columns", columns)


@dataclass(frozen=True, slots=True, eq=False)
class FeatureView:
    """Features of one entity, from one source."""

    name: str
    _: KW_ONLY
    entities: Sequence[Entity]
    source: Source
    schema: Sequence[Field]
    ttl: timedelta | None = None
    """How long a value is valid after its event time. None means forever."""
    transform: Transform | None = None
    """Function from the source's columns to the view's columns."""
    checks: Sequence[Check] = ()
    """Checks of rows, which send bad rows to quarantine, and of whole batches, which refuse a bad batch."""
    owner: str = ""
    purposes: Sequence[str] = ()
    """Purposes that the data may be used for. Empty allows every purpose."""
    region: str | None = None
    """Region of the data. None means the cluster's region."""
    retention: timedelta | None = None
    """How long rows are stored after their event time. None means forever."""
    subject_key: str | None = None
    """Column that identifies a natural person, for erasure."""
    created_lag: timedelta = timedelta(0)
    """Time from event time to created time, if the source has no created timestamp."""
    event_id: str | None = None
    """Column that identifies an event, for a view with aggregations. A correction has the same id as its event."""
    aggregations: Sequence[Aggregation] = ()
    """Aggregations over events. If given, they are the view's features, instead of its columns."""

    def __post_init__(self) -> None:
        validate_name("Feature view", self.name, longest=LONGEST_NAME)
        if "__" in self.name:
            raise DefinitionError(f"Feature view '{self.name}': '__' is reserved for '<view>__<feature>'.")
        for name in ("entities", "schema", "checks", "aggregations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "purposes", _names(f"View '{self.name}'", "purposes", self.purposes))
        self._check_columns()
        self._check_rules()
        self._check_times()
        self._check_aggregations()

    @property
    def join_keys(self) -> list[str]:
        """The columns that identify a row's entity, in order."""
        return [key for entity in self.entities for key in entity.join_keys]

    @property
    def key_types(self) -> dict[str, str]:
        """The declared types of join keys. Keys without a declared type are left out."""
        return {key: dtype for entity in self.entities for key, dtype in entity.key_types.items()}

    @property
    def version(self) -> str:
        """Content hash of the definition and the transform's code, in 12 hex digits."""
        return content_hash(self.definition())

    @property
    def windows(self) -> WindowSpec | None:
        """How the features are computed from events. None if the features are the columns themselves."""
        if self.event_id is None:
            return None
        dtypes = {field.name: field.dtype for field in self.schema}
        return window_spec(self.event_id, self._outputs(), dtypes)

    @property
    def features(self) -> dict[str, str]:
        """The features that readers get, as name to dtype."""
        if self.windows is not None:
            return {output.name: output.dtype for output in self.windows.outputs}
        return {field.name: field.dtype for field in self.schema}

    def definition(self) -> dict[str, Any]:
        """Return the definition as JSON. The JSON is enough to read the view without this object."""
        return {
            "name": self.name,
            "entities": [entity_definition(entity) for entity in self.entities],
            "join_keys": self.join_keys,
            "schema": [field_definition(field) for field in self.schema],
            "ttl_s": _seconds(self.ttl),
            "source": self.source.definition(),
            "created_lag_s": _seconds(self.created_lag),
            "transform": code_definition(self.transform),
            "checks": [check.definition() for check in self.checks],
            "owner": self.owner,
            "purposes": list(self.purposes),
            "region": self.region,
            "retention_s": _seconds(self.retention),
            "subject_key": self.subject_key,
            **self._windowing(),
        }

    def _windowing(self) -> dict[str, Any]:
        if self.event_id is None:
            return {}
        return {"event_id": self.event_id, "aggregations": self._outputs()}

    def _outputs(self) -> list[dict[str, Any]]:
        return [output for aggregation in self.aggregations for output in aggregation.definition()]

    def _check_columns(self) -> None:
        if not self.entities or not self.join_keys:
            raise DefinitionError(f"View '{self.name}' has no entity. Give entities=[Entity(…)].")
        if not self.schema:
            raise DefinitionError(f"View '{self.name}' has no features. Give schema=[Field(…)].")
        columns = [Named("join key", key) for key in self.join_keys]
        keys = set(self.join_keys)
        for feature in self.schema:
            if feature.name in keys:
                raise DefinitionError(
                    f"View '{self.name}': '{feature.name}' is a join key and cannot be a feature too. "
                    "Remove it from the schema, or give the feature another name in the transform."
                )
            if feature.from_columns and self.transform is None:
                raise DefinitionError(
                    f"View '{self.name}': field '{feature.name}' has from_columns, but the view has no transform, so "
                    "the field is the source column of the same name. Remove from_columns."
                )
            columns.append(Named("field", feature.name))
        for column in columns:
            require_not_reserved(f"View '{self.name}'", column)
        require_distinct_names(f"View '{self.name}'", columns)

    def _check_rules(self) -> None:
        dtypes = {field.name: field.dtype for field in self.schema}
        columns = dict.fromkeys([*self.join_keys, *dtypes])
        for check in self.checks:
            if not isinstance(check, Check):
                raise DefinitionError(
                    f"View '{self.name}': {check!r} is not a check. Use NotNull, Range, Allowed or another check."
                )
            for column in check.columns:
                if column not in columns:
                    raise DefinitionError(
                        f"View '{self.name}' checks the unknown column '{column}'.{did_you_mean(column, columns)}"
                    )
                check.validate_dtype(dtypes.get(column))
                if isinstance(check, RowCheck) and column in self.key_types:
                    check.validate_dtype(self.key_types[column])
        if self.subject_key is not None and self.subject_key not in columns:
            raise DefinitionError(
                f"View '{self.name}': subject_key '{self.subject_key}' is not one of its columns."
                f"{did_you_mean(self.subject_key, columns)}"
            )

    def _check_times(self) -> None:
        for name in ("ttl", "retention"):
            value = getattr(self, name)
            if value is not None:
                validate_span(f"View '{self.name}': {name}", value)
        validate_span(f"View '{self.name}': created_lag", self.created_lag, longest=CENTURY, allow_zero=True)

    def _check_aggregations(self) -> None:
        if (self.event_id is None) != (not self.aggregations):
            raise DefinitionError(
                f"View '{self.name}': event_id and aggregations belong together. Give both or neither."
            )
        if self.event_id is None:
            return
        if self.ttl is not None:
            raise DefinitionError(
                f"View '{self.name}' is aggregated: its windows define how long an event counts. Remove the ttl."
            )
        dtypes = {field.name: field.dtype for field in self.schema}
        try:
            windows = window_spec(self.event_id, self._outputs(), dtypes)
        except DefinitionError as error:
            raise DefinitionError(f"View '{self.name}': {error}") from error
        if windows.event_id_dtype not in ("string", "int64", "int32"):
            raise DefinitionError(
                f"View '{self.name}': event_id '{self.event_id}' must be text or whole numbers, not "
                f"{windows.event_id_dtype}."
            )
        longest = timedelta(microseconds=windows.longest_us)
        if self.retention is not None and self.retention < longest:
            raise DefinitionError(
                f"View '{self.name}': the retention is {self.retention}, but a window reaches back {longest}. "
                "Make the retention at least as long."
            )
        keys = {key.lower(): key for key in self.join_keys}
        for output in windows.outputs:
            if (key := keys.get(output.name.lower())) is not None:
                raise DefinitionError(
                    f"View '{self.name}': the join key '{key}' and the feature '{output.name}' have the same name. "
                    "Rename the key."
                )


def content_hash(value: Any) -> str:
    """Return the first 12 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()[:12]


def entity_definition(entity: Entity) -> dict[str, Any]:
    """Return an entity as JSON.

    Types are included only if declared. A view's version is a hash of this JSON, so a view that declares no types
    keeps the version that it had before types existed.
    """
    types = {"key_types": dict(entity.key_types)} if entity.key_types else {}
    return {"name": entity.name, "join_keys": list(entity.join_keys), **types}


def field_definition(field: Field) -> dict[str, Any]:
    """Return a field as JSON."""
    return {
        "name": field.name,
        "dtype": field.dtype,
        "sensitivity": field.sensitivity.value,
        "categorical": field.categorical,
        "description": field.description,
        # Included only if used: the JSON is hashed into the view's version, which must not change.
        **({"from_columns": list(field.from_columns)} if field.from_columns else {}),
    }


def code_definition(transform: Transform | None) -> dict[str, str] | None:
    """Return a transform's name and the hash of its code, or None without a transform."""
    if transform is None:
        return None
    code = source_code(transform)
    name = f"{transform.__module__}:{getattr(transform, '__qualname__', '?')}"
    return {"name": name, "sha256": hashlib.sha256(code.encode()).hexdigest()}


def _seconds(span: timedelta | None) -> float | None:
    return None if span is None else span.total_seconds()


def _names(owner: str, argument: str, values: Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple. Raise DefinitionError if a single string was given."""
    if isinstance(values, str):
        raise DefinitionError(f"{owner}: {argument} must be a list, got '{values}'. Write [{values!r}].")
    return tuple(values)
