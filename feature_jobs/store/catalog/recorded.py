"""All recorded definitions, as JSON from the ledger, and the model versions that were trained with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.ledger import Ledger
from cluster.ledger.events import FeatureServiceApplied, FeatureViewApplied, ModelRegistered


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedView:
    """An applied version of a view."""

    name: str
    version: str
    definition: dict[str, Any]
    module: str
    """The module that the view was applied from. Empty if an older release recorded no module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedService:
    """An applied version of a service."""

    name: str
    version: str
    view_order: list[str]
    view_versions: dict[str, str]
    module: str
    on_demand: list[dict[str, Any]]
    """Definitions of the service's on-demand transforms."""
    missing: dict[str, dict[str, Any]]
    """Policies for missing values, by `<view>__<feature>`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelUse:
    """A registered model version, and the definitions that its training set was built with."""

    model: str
    version: int
    view_versions: dict[str, str]
    on_demand: list[dict[str, Any]]
    """Definitions of the on-demand transforms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """All recorded versions of views and services, and their uses by models."""

    views: dict[tuple[str, str], RecordedView]
    """By name and version, sorted by the time when each version was last applied."""
    services: dict[tuple[str, str], RecordedService]
    """By name and version, sorted in the same way."""
    uses: list[ModelUse]

    @property
    def newest_views(self) -> dict[str, RecordedView]:
        """For each view's name, the version that was applied last."""
        return {view.name: view for view in self.views.values()}

    @property
    def newest_services(self) -> dict[str, RecordedService]:
        """For each service's name, the version that was applied last."""
        return {service.name: service for service in self.services.values()}


def read_recorded(ledger: Ledger) -> Recorded:
    """Read views, services and the lineage of models from the ledger."""
    views: dict[tuple[str, str], RecordedView] = {}
    for entry in ledger.entries(FeatureViewApplied):
        payload = entry.payload
        view = RecordedView(
            name=payload["view"],
            version=payload["version"],
            definition=payload["definition"],
            module=payload.get("module", ""),
        )
        # Removed first, so that a version that is applied again moves to the end.
        views.pop((view.name, view.version), None)
        views[view.name, view.version] = view
    services: dict[tuple[str, str], RecordedService] = {}
    for entry in ledger.entries(FeatureServiceApplied):
        payload = entry.payload
        service = RecordedService(
            name=payload["service"],
            version=payload["version"],
            view_order=payload["view_order"],
            view_versions=payload["views"],
            module=payload.get("module", ""),
            on_demand=payload.get("on_demand", []),
            missing=payload.get("missing", {}),
        )
        services.pop((service.name, service.version), None)
        services[service.name, service.version] = service
    return Recorded(views=views, services=services, uses=_uses(ledger, services))


def _uses(ledger: Ledger, services: dict[tuple[str, str], RecordedService]) -> list[ModelUse]:
    """List the model versions that were trained with a feature service."""
    uses = []
    for entry in ledger.entries(ModelRegistered):
        lineage = entry.payload["lineage"]
        service = services.get((lineage.get("service", ""), lineage.get("service_version", "")))
        if service is not None:
            use = ModelUse(
                model=entry.payload["name"],
                version=entry.payload["version"],
                view_versions=service.view_versions,
                on_demand=service.on_demand,
            )
            uses.append(use)
    return uses
