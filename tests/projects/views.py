"""Small definitions of views, and specifications of views without a definition."""

from __future__ import annotations

from typing import Any

from cluster.ledger import Ledger
from feature_jobs.store import Entity, FeatureService, FeatureView, Field, FileSource
from feature_jobs.store.catalog.specifications import (
    Definitions,
    FieldSpec,
    ServiceSpec,
    ViewSpec,
    apply,
    service_spec,
)

PERSON = Entity("person", join_keys=["person_id"])


def make_view(name: str = "income", **changes: Any) -> FeatureView:
    """Return a valid view of persons with one feature `amount`. `changes` replaces some arguments."""
    parts: dict[str, Any] = {
        "entities": [PERSON],
        "source": FileSource("x.parquet", event_timestamp="at"),
        "schema": [Field("amount", "float64")],
    }
    return FeatureView(name, **(parts | changes))


def define(*views: FeatureView, service: FeatureService | None = None, module: str = "m") -> Definitions:
    """Return the definitions of a module: some views, and optionally a service with its views."""
    services = {} if service is None else {service.name: service}
    every = [*views, *(service.views if service else [])]
    return Definitions(module=module, views={view.name: view for view in every}, services=services)


def apply_service(ledger: Ledger, service: FeatureService) -> ServiceSpec:
    """Apply a service with its views, and return its specification from the ledger."""
    apply(define(service=service), ledger, actor="user:test")
    return service_spec(ledger, service.name)


def make_spec(
    name: str, keys: list[str], /, *, version: str = "v1", ttl_h: float | None = None, **fields: str
) -> ViewSpec:
    """Return a view's specification. A field is a dtype, or a dtype and a column class with a slash between them."""
    specs = []
    for field, text in fields.items():
        dtype, _, sensitivity = text.partition("/")
        specs.append(
            FieldSpec(name=field, dtype=dtype, sensitivity=sensitivity or "internal", categorical=False)
        )
    ttl_s = None if ttl_h is None else ttl_h * 3600
    return ViewSpec(name=name, version=version, join_keys=keys, fields=specs, ttl_s=ttl_s)


def service_of(*views: ViewSpec) -> ServiceSpec:
    """Return a service with these views."""
    return ServiceSpec(name="s", version="s1", views=list(views))
