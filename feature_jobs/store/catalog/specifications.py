"""From a user's module to the ledger, and from the ledger back to plain specifications.

Applying is the only step that needs the definitions' code at hand besides ingestion: whoever reads features (training
sets, the online store, replicas) rebuilds `ViewSpec` and `ServiceSpec` from events and never imports a user's module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from cluster.errors import DefinitionError, FeatureServiceNotFound, FeatureViewNotFound, did_you_mean
from cluster.ledger import Ledger
from cluster.ledger.events import FeatureServiceApplied, FeatureViewApplied
from feature_jobs.store.definitions.aggregations import EVERY, WindowSpec, window_spec
from feature_jobs.store.definitions.limits import clamp_span_s
from feature_jobs.store.definitions.missing import NO_POLICY, MissingPolicy, parse
from feature_jobs.store.definitions.services import FeatureService
from feature_jobs.store.definitions.views import FeatureView

N = TypeVar("N", FeatureView, FeatureService)


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldSpec:
    """A feature as the ledger knows it."""

    name: str
    dtype: str
    sensitivity: str
    categorical: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """A view as the ledger knows it: what is needed to read it."""

    name: str
    version: str
    join_keys: list[str]
    fields: list[FieldSpec]
    """What readers get."""
    ttl_s: float | None
    purposes: tuple[str, ...] = ()
    """What it may be used for; empty allows every purpose."""
    region: str | None = None
    """None is wherever the cluster is."""
    retention_s: float | None = None
    """How long rows are kept after their event; None is for ever."""
    windows: WindowSpec | None = None
    """How the features are made of events; none where they are the columns of the feature table."""
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
    """An on-demand transform as the ledger knows it."""

    name: str
    inputs: tuple[FieldSpec, ...]
    sources: tuple[str, ...]
    """Names of views."""
    fields: tuple[FieldSpec, ...]
    function: str
    """`module:name`"""
    sha256: str
    """Of its code."""

    @property
    def columns(self) -> list[str]:
        """Output column names, `<name>__<feature>`."""
        return [f"{self.name}__{field.name}" for field in self.fields]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSpec:
    """A service as the ledger knows it."""

    name: str
    version: str
    views: list[ViewSpec]
    on_demand: tuple[OnDemandSpec, ...] = ()
    missing: MissingPolicy = NO_POLICY

    @property
    def columns(self) -> list[str]:
        """Output column names of all views and on-demand transforms, in order."""
        read = [column for view in self.views for column in view.columns]
        return read + [column for one in self.on_demand for column in one.columns]

    @property
    def dtypes(self) -> dict[str, str]:
        """Output column to dtype, in order."""
        parts: list[ViewSpec | OnDemandSpec] = [*self.views, *self.on_demand]
        return {
            column: field.dtype
            for one in parts
            for column, field in zip(one.columns, one.fields, strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, to cross a process boundary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ServiceSpec:
        """The spec that `to_dict` gave."""
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
                    **one,
                    "inputs": tuple(FieldSpec(**field) for field in one["inputs"]),
                    "fields": tuple(FieldSpec(**field) for field in one["fields"]),
                    "sources": tuple(one["sources"]),
                }
            )
            for one in data.get("on_demand", ())
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
        """The view of that name.

        Raises:
            FeatureViewNotFound: the module has none.
        """
        if name not in self.views:
            raise FeatureViewNotFound(
                f"No feature view '{name}' in {self.module}.", hint=did_you_mean(name, self.views)
            )
        return self.views[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What an apply changed: names to versions."""

    views: dict[str, str]
    services: dict[str, str]


def load_definitions(module: str) -> Definitions:
    """Import a module and gather the views and services among its names.

    Raises:
        DefinitionError: the module is missing, broken, holds no view, or names two things alike.
    """
    loaded = import_module(module)
    values = list(vars(loaded).values())
    services = _by_name([value for value in values if isinstance(value, FeatureService)], module)
    inner = [view for service in services.values() for view in service.views]
    views = _by_name([value for value in values if isinstance(value, FeatureView)] + inner, module)
    if not views:
        raise DefinitionError(f"Module '{module}' holds no FeatureView at its top level.")
    return Definitions(module=module, views=views, services=services)


def apply(definitions: Definitions, ledger: Ledger, *, actor: str) -> Applied:
    """Record views and services whose newest recorded version is another."""
    known = {name: spec.version for name, spec in view_specs(ledger).items()}
    views = {name: view for name, view in definitions.views.items() if known.get(name) != view.version}
    for view in views.values():
        event = FeatureViewApplied(
            view=view.name, version=view.version, definition=view.definition(), module=definitions.module
        )
        ledger.append(event, actor=actor)
    recorded = {
        entry.payload["service"]: entry.payload["version"] for entry in ledger.entries(FeatureServiceApplied)
    }
    services = {
        name: service
        for name, service in definitions.services.items()
        if recorded.get(name) != service.version
    }
    for service in services.values():
        ledger.append(_service_event(service, definitions.module), actor=actor)
    return Applied(
        views={name: view.version for name, view in views.items()},
        services={name: service.version for name, service in services.items()},
    )


def view_specs(ledger: Ledger) -> dict[str, ViewSpec]:
    """The newest version of every applied view."""
    return {spec.name: spec for spec in _all_views(ledger).values()}


def view_spec(ledger: Ledger, name: str) -> ViewSpec:
    """The newest version of an applied view.

    Raises:
        FeatureViewNotFound: no view of that name was applied.
    """
    known = view_specs(ledger)
    if name not in known:
        raise FeatureViewNotFound(
            f"No feature view '{name}' has been applied.",
            hint=f"{did_you_mean(name, known)} Run `python -m feature_jobs.apply`.",
        )
    return known[name]


def service_spec(ledger: Ledger, name: str, version: str | None = None) -> ServiceSpec:
    """A version of an applied service, by default the newest.

    Raises:
        FeatureServiceNotFound: no such service or version was applied.
    """
    applied = [entry.payload for entry in ledger.entries(FeatureServiceApplied)]
    of_name = [payload for payload in applied if payload["service"] == name]
    if not of_name:
        known = {payload["service"] for payload in applied}
        raise FeatureServiceNotFound(
            f"No feature service '{name}' has been applied.",
            hint=f"{did_you_mean(name, known)} Run `python -m feature_jobs.apply`.",
        )
    fitting = [payload for payload in of_name if version in (None, payload["version"])]
    if not fitting:
        versions = [payload["version"] for payload in of_name]
        raise FeatureServiceNotFound(
            f"Feature service '{name}' has no version '{version}'.{did_you_mean(str(version), versions)}"
        )
    payload = fitting[-1]
    known_views = _all_views(ledger)
    views = [known_views[view, payload["views"][view]] for view in payload["view_order"]]
    dtypes = {
        column: field.dtype for view in views for column, field in zip(view.columns, view.fields, strict=True)
    }
    return ServiceSpec(
        name=name,
        version=payload["version"],
        views=views,
        on_demand=tuple(_on_demand_spec(one) for one in payload.get("on_demand", [])),
        missing=parse(payload.get("missing", {}), dtypes),
    )


def _all_views(ledger: Ledger) -> dict[tuple[str, str], ViewSpec]:
    """Every version of every view; a version applied again counts as the newest."""
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
    """The types of join keys that a view's definition declares."""
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
    """The features of an aggregated view; each is as sensitive as its column, a count of events as their ids."""
    columns = {field.name: field for field in stored}
    fields = []
    for output in windows.outputs:
        column = columns[windows.event_id if output.column == EVERY else output.column]
        chosen = output.function in ("min", "max", "last")
        fields.append(
            FieldSpec(
                name=output.name,
                dtype=output.dtype,
                sensitivity=column.sensitivity,
                categorical=chosen and column.categorical,
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
        on_demand=[one.definition() for one in service.on_demand],
        missing=service.missing_definition(),
    )


def import_module(module: str) -> ModuleType:
    # `ray job submit` runs in the uploaded folder, which is not always on the path.
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise DefinitionError(
                f"No module '{module}' for definitions. Start from the folder that holds it, or put it on PYTHONPATH."
            ) from error
        raise DefinitionError(
            f"Definitions module '{module}' imports '{error.name}', which is missing."
        ) from error


def _by_name(found: Iterable[N], module: str) -> dict[str, N]:
    named: dict[str, N] = {}
    for item in found:
        if named.setdefault(item.name, item) is not item:
            raise DefinitionError(f"Module '{module}' holds two definitions named '{item.name}'.")
    return named
