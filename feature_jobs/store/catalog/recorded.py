"""What the ledger knows of definitions, whole and as JSON, and which model versions were made with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.ledger import Ledger
from cluster.ledger.events import FeatureServiceApplied, FeatureViewApplied, ModelRegistered


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedView:
    """A version of a view as it was applied."""

    name: str
    version: str
    definition: dict[str, Any]
    module: str
    """It was applied from; empty where an older release did not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedService:
    """A version of a service as it was applied."""

    name: str
    version: str
    view_order: list[str]
    view_versions: dict[str, str]
    module: str
    on_demand: list[dict[str, Any]]
    """Definitions of its on-demand transforms."""
    missing: dict[str, dict[str, Any]]
    """What becomes of missing values, by `<view>__<feature>`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelUse:
    """A registered model version, and the view versions that its training set was built with."""

    model: str
    version: int
    view_versions: dict[str, str]
    on_demand: list[dict[str, Any]]
    """Definitions of the on-demand transforms, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """All of it."""

    views: dict[tuple[str, str], RecordedView]
    """By name and version, the one applied last at the end."""
    services: dict[tuple[str, str], RecordedService]
    uses: list[ModelUse]

    @property
    def newest_views(self) -> dict[str, RecordedView]:
        """Of each view the version that was applied last."""
        return {view.name: view for view in self.views.values()}

    @property
    def newest_services(self) -> dict[str, RecordedService]:
        """Of each service the version that was applied last."""
        return {service.name: service for service in self.services.values()}


def read_recorded(ledger: Ledger) -> Recorded:
    """Read views, services and models' lineage from the ledger."""
    views: dict[tuple[str, str], RecordedView] = {}
    for entry in ledger.entries(FeatureViewApplied):
        said = entry.payload
        view = RecordedView(
            name=said["view"],
            version=said["version"],
            definition=said["definition"],
            module=said.get("module", ""),
        )
        views.pop((view.name, view.version), None)
        views[view.name, view.version] = view
    services: dict[tuple[str, str], RecordedService] = {}
    for entry in ledger.entries(FeatureServiceApplied):
        said = entry.payload
        service = RecordedService(
            name=said["service"],
            version=said["version"],
            view_order=said["view_order"],
            view_versions=said["views"],
            module=said.get("module", ""),
            on_demand=said.get("on_demand", []),
            missing=said.get("missing", {}),
        )
        services.pop((service.name, service.version), None)
        services[service.name, service.version] = service
    return Recorded(views=views, services=services, uses=_uses(ledger, services))


def _uses(ledger: Ledger, services: dict[tuple[str, str], RecordedService]) -> list[ModelUse]:
    """Models without a feature service use no view."""
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
