"""Record a module's definitions in the ledger, and rebuild specifications of them from the ledger.

Only `feature_jobs.apply` and ingestion import a user's module. All readers of features (training sets, the online
store, replicas) rebuild `ViewSpec` and `ServiceSpec` from events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from cluster.errors import DefinitionError, FeatureServiceNotFound, FeatureViewNotFound, did_you_mean
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureServiceApplied, FeatureViewApplied
from feature_jobs.store.definitions.aggregations import ALL_EVENTS, Function, WindowSpec, window_spec
from feature_jobs.store.definitions.limits import clamp_span_s
from feature_jobs.store.definitions.missing import NO_POLICY, MissingPolicy, parse_policy
from feature_jobs.store.definitions.modules import import_module
from feature_jobs.store.definitions.services import FeatureService
from feature_jobs.store.definitions.views import FeatureView

N = TypeVar("N", FeatureView, FeatureService)

APPLY_ADVICE = "Apply it with `python -m feature_jobs.apply definitions=…`."


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldSpec:
    """A feature, as recorded in the ledger."""

    name: str
    dtype: str
    sensitivity: str
    categorical: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """A view, as recorded in the ledger: everything that is needed to read it."""

    name: str
    version: str
    join_keys: list[str]
    fields: list[FieldSpec]
    """The features that readers get."""
    ttl_s: float | None
    """TTL in seconds. None means no limit."""
    purposes: tuple[str, ...] = ()
    """Purposes that the data may be used for. Empty allows every purpose."""
    region: str | None = None
    """Region of the data. None means the cluster's region."""
    retention_s: float | None = None
    """How long rows are stored after their event time, in seconds. None means forever."""
    windows: WindowSpec | None = None
    """How the features are computed from events. None if the features are columns of the feature table."""
    event_fields: tuple[FieldSpec, ...] = ()
    """The columns of the feature table of an aggregated view."""
    key_types: dict[str, str] = field(default_factory=dict)
    """The declared types of join keys."""

    @property
    def stored(self) -> list[FieldSpec]:
        """The columns of the feature table."""
        return list(self.event_fields) or self.fields

    @property
    def columns(self) -> list[str]:
        """Output column names, `<view>__<feature>`."""
        return [f"{self.name}__{field.name}" for field in self.fields]


@dataclass(frozen=True, kw_only=True, slots=True)
class OnDemandSpec:
    """An on-demand transform, as recorded in the ledger."""

    name: str
    inputs: tuple[FieldSpec, ...]
    sources: tuple[str, ...]
    """Names of the views that the transform reads."""
    fields: tuple[FieldSpec, ...]
    function: str
    """The transform's function as `module:name`."""
    sha256: str
    """SHA-256 of the function's code."""

    @property
    def columns(self) -> list[str]:
        """Output column names, `<name>__<feature>`."""
        return [f"{self.name}__{field.name}" for field in self.fields]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSpec:
    """A service, as recorded in the ledger."""

    name: str
    version: str
    views: list[ViewSpec]
    on_demand: tuple[OnDemandSpec, ...] = ()
    missing: MissingPolicy = NO_POLICY

    @property
    def columns(self) -> list[str]:
        """Output column names of all views and on-demand transforms, in order."""
        return list(self.dtypes)

    @property
    def dtypes(self) -> dict[str, str]:
        """Output column to dtype, in order."""
        parts: list[ViewSpec | OnDemandSpec] = [*self.views, *self.on_demand]
        return {
            column: field.dtype
            for part in parts
            for column, field in zip(part.columns, part.fields, strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data, which can cross a process boundary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ServiceSpec:
        """Rebuild a spec from the data of `to_dict`."""
        views = [
            ViewSpec(
                **{
                    **view,
                    "fields": [FieldSpec(**field) for field in view["fields"]],
                    "purposes": tuple(view["purposes"]),
                    "windows": WindowSpec.from_dict(view["windows"]) if view.get("windows") else None,
                    "event_fields": tuple(FieldSpec(**field) for field in view.get("event_fields", ())),
                }
            )
            for view in data["views"]
        ]
        on_demand = tuple(
            OnDemandSpec(
                **{
                    **transform,
                    "inputs": tuple(FieldSpec(**field) for field in transform["inputs"]),
                    "fields": tuple(FieldSpec(**field) for field in transform["fields"]),
                    "sources": tuple(transform["sources"]),
                }
            )
            for transform in data.get("on_demand", ())
        )
        policy = data.get("missing") or {"defaults": {}, "refused": ()}
        missing = MissingPolicy(defaults=policy["defaults"], refused=tuple(policy["refused"]))
        name, version = data["name"], data["version"]
        return cls(name=name, version=version, views=views, on_demand=on_demand, missing=missing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Definitions:
    """All views and services of a module."""

    module: str
    views: dict[str, FeatureView]
    services: dict[str, FeatureService]

    def view(self, name: str) -> FeatureView:
        """Return the view with this name.

        Raises:
            FeatureViewNotFound: The module does not define the view.
        """
        if name not in self.views:
            raise FeatureViewNotFound(
                f"No feature view '{name}' in {self.module}.", hint=did_you_mean(name, self.views)
            )
        return self.views[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """The definitions that `apply` recorded."""

    views: dict[str, str]
    """Name to version."""
    services: dict[str, str]
    """Name to version."""


def load_definitions(module: str) -> Definitions:
    """Import a module and collect the views and services at its top level, and the views of these services.

    Raises:
        DefinitionError: The module or one of its imports is missing, no view is defined, or a name is used twice.
    """
    loaded = import_module(module)
    values = list(vars(loaded).values())
    services = _by_name([value for value in values if isinstance(value, FeatureService)], module)
    service_views = [view for service in services.values() for view in service.views]
    views = _by_name([value for value in values if isinstance(value, FeatureView)] + service_views, module)
    if not views:
        raise DefinitionError(f"Module '{module}' holds no FeatureView at its top level.")
    return Definitions(module=module, views=views, services=services)


def apply(definitions: Definitions, ledger: Ledger, *, actor: str) -> Applied:
    """Record the views and services that differ from their newest recorded version."""
    recorded_views = {name: spec.version for name, spec in view_specs(ledger).items()}
    views = {
        name: view for name, view in definitions.views.items() if recorded_views.get(name) != view.version
    }
    for view in views.values():
        event = FeatureViewApplied(
            view=view.name, version=view.version, definition=view.definition(), module=definitions.module
        )
        ledger.append(event, actor=actor)
    recorded_services = {
        entry.payload["service"]: entry.payload["version"] for entry in ledger.entries(FeatureServiceApplied)
    }
    services = {
        name: service
        for name, service in definitions.services.items()
        if recorded_services.get(name) != service.version
    }
    for service in services.values():
        ledger.append(_service_event(service, definitions.module), actor=actor)
    return Applied(
        views={name: view.version for name, view in views.items()},
        services={name: service.version for name, service in services.items()},
    )


def view_specs(ledger: Ledger) -> dict[str, ViewSpec]:
    """Return the newest version of every applied view, by name."""
    return {spec.name: spec for spec in _all_views(ledger).values()}


def view_spec(ledger: Ledger, name: str) -> ViewSpec:
    """Return the newest version of an applied view.

    Raises:
        FeatureViewNotFound: No view of that name was applied.
    """
    applied = ledger.newest(FeatureViewApplied, view=name)
    if applied is None:
        raise FeatureViewNotFound(
            f"No feature view '{name}' has been applied.",
            hint=f"{did_you_mean(name, view_specs(ledger))} {APPLY_ADVICE}",
        )
    return _view_spec(applied.payload["version"], applied.payload["definition"])


def spec_of(view: FeatureView) -> ViewSpec:
    """Return the specification that applying a view would record."""
    return _view_spec(view.version, view.definition())


def service_spec(ledger: Ledger, name: str, version: str | None = None) -> ServiceSpec:
    """Return a version of an applied service, by default the newest.

    Raises:
        FeatureServiceNotFound: No such service or version was applied.
    """
    payload = _applied_service(ledger, name, version)
    views = [_applied_view(ledger, view, payload["views"][view]) for view in payload["view_order"]]
    dtypes = {
        column: field.dtype for view in views for column, field in zip(view.columns, view.fields, strict=True)
    }
    return ServiceSpec(
        name=name,
        version=payload["version"],
        views=views,
        on_demand=tuple(_on_demand_spec(definition) for definition in payload.get("on_demand", [])),
        missing=parse_policy(payload.get("missing", {}), dtypes),
    )


def _applied_service(ledger: Ledger, name: str, version: str | None) -> dict[str, Any]:
    """Return the payload of the event that applied a version of a service."""
    versions = []
    for entry in ledger.find(FeatureServiceApplied, service=name, newest_first=True):
        if version in (None, entry.payload["version"]):
            return entry.payload
        versions.append(entry.payload["version"])
    if versions:
        raise FeatureServiceNotFound(
            f"Feature service '{name}' has no version '{version}'.{did_you_mean(str(version), versions)}"
        )
    known = {entry.payload["service"] for entry in ledger.entries(FeatureServiceApplied)}
    raise FeatureServiceNotFound(
        f"No feature service '{name}' has been applied.",
        hint=f"{did_you_mean(name, known)} {APPLY_ADVICE}",
    )


def _applied_view(ledger: Ledger, name: str, version: str) -> ViewSpec:
    """Return a version of a view that a service names. It was applied before the service."""
    applied = ledger.find(FeatureViewApplied, view=name, newest_first=True)
    payload = next(entry.payload for entry in applied if entry.payload["version"] == version)
    return _view_spec(version, payload["definition"])


def _all_views(ledger: Ledger) -> dict[tuple[str, str], ViewSpec]:
    """Return every version of every view, by name and version. A version that is applied again is the newest."""
    specs: dict[tuple[str, str], ViewSpec] = {}
    for entry in ledger.entries(FeatureViewApplied):
        key = entry.payload["view"], entry.payload["version"]
        specs.pop(key, None)
        specs[key] = _view_spec(entry.payload["version"], entry.payload["definition"])
    return specs


def _view_spec(version: str, definition: dict[str, Any]) -> ViewSpec:
    fields = _fields(definition["schema"])
    windows = None
    if "event_id" in definition:
        dtypes = {field.name: field.dtype for field in fields}
        windows = window_spec(definition["event_id"], definition["aggregations"], dtypes)
    return ViewSpec(
        name=definition["name"],
        version=version,
        join_keys=list(definition["join_keys"]),
        fields=fields if windows is None else aggregated_fields(windows, fields),
        windows=windows,
        event_fields=() if windows is None else tuple(fields),
        ttl_s=clamp_span_s(definition["ttl_s"]),
        purposes=tuple(definition["purposes"]),
        region=definition["region"],
        retention_s=clamp_span_s(definition.get("retention_s")),
        key_types=declared_key_types(definition),
    )


def declared_key_types(definition: Mapping[str, Any]) -> dict[str, str]:
    """Return the types of join keys that a view's definition declares."""
    return {
        key: dtype for entity in definition["entities"] for key, dtype in entity.get("key_types", {}).items()
    }


def _on_demand_spec(definition: dict[str, Any]) -> OnDemandSpec:
    return OnDemandSpec(
        name=definition["name"],
        inputs=tuple(_fields(definition["inputs"])),
        sources=tuple(definition["sources"]),
        fields=tuple(_fields(definition["schema"])),
        function=definition["transform"]["name"],
        sha256=definition["transform"]["sha256"],
    )


def _fields(schema: Iterable[dict[str, Any]]) -> list[FieldSpec]:
    return [FieldSpec(**{name: field[name] for name in FieldSpec.__dataclass_fields__}) for field in schema]


def aggregated_fields(windows: WindowSpec, stored: Iterable[FieldSpec]) -> list[FieldSpec]:
    """Return the features of an aggregated view.

    Each feature has the sensitivity of its column. A count of events has the sensitivity of the event id.
    """
    columns = {field.name: field for field in stored}
    fields = []
    for output in windows.outputs:
        column = columns[windows.event_id if output.column == ALL_EVENTS else output.column]
        picks_value = Function(output.function).picks_value
        fields.append(
            FieldSpec(
                name=output.name,
                dtype=output.dtype,
                sensitivity=column.sensitivity,
                categorical=picks_value and column.categorical,
            )
        )
    return fields


def _service_event(service: FeatureService, module: str) -> FeatureServiceApplied:
    return FeatureServiceApplied(
        service=service.name,
        version=service.version,
        views={view.name: view.version for view in service.views},
        view_order=[view.name for view in service.views],
        module=module,
        on_demand=[transform.definition() for transform in service.on_demand],
        missing=service.missing_definition(),
    )


def _by_name(definitions: Iterable[N], module: str) -> dict[str, N]:
    """Index definitions by name. Raise DefinitionError if two have the same name."""
    by_name: dict[str, N] = {}
    for definition in definitions:
        if by_name.setdefault(definition.name, definition) is not definition:
            raise DefinitionError(f"Module '{module}' holds two definitions named '{definition.name}'.")
    return by_name
