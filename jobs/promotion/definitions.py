"""The feature definitions of a version, and their comparison with the definitions of another installation.

The two installations may read the features from other files or tables, for other purposes and in another region. But
the features must have the same meaning: the same columns and types, the same hash of each transform's code, the same
TTL and the same rules for missing values. `feature_jobs/store/catalog/differences.py` classifies the changes of a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.ledger.chain import Entry
from cluster.ledger.events import FeatureServiceApplied, FeatureViewApplied
from cluster.registry import Lineage
from cluster.security.authorization.policy import Resource
from feature_jobs.store.catalog.differences import view_changes

_SAME = {"on_demand": "on-demand transforms", "missing": "rules for missing values", "view_order": "views"}
"""Parts of a service that must be equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Definitions:
    """A feature service and its views, as payloads of the events that applied them."""

    service: dict[str, Any] | None
    """None if the version was trained without a feature service."""
    views: dict[str, dict[str, Any]]
    """By name."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `definitions.json`."""
        return {"service": self.service, "views": self.views}


class DefinitionsDiffer(RefusedError):
    """The features of this installation have another meaning than those that a version was trained with."""


def definition_entries(ledger: Ledger, lineage: Lineage) -> list[Entry]:
    """Return the entries that applied a version's service and views; none without a service.

    Raises:
        DefinitionsDiffer: The service was never applied here, because the training set is from another installation.
    """
    if not lineage.service:
        return []
    found = ledger.find(FeatureServiceApplied, service=lineage.service, newest_first=True)
    service = next((entry for entry in found if entry.payload["version"] == lineage.service_version), None)
    if service is None:
        raise DefinitionsDiffer(
            f"The model was trained with version {lineage.service_version} of the feature service '{lineage.service}', "
            "which was never applied here. Train it on a training set of this installation."
        )
    views = []
    for view, version in service.payload["views"].items():
        applied = ledger.find(FeatureViewApplied, view=view, newest_first=True)
        views.append(next(entry for entry in applied if entry.payload["version"] == version))
    return [*views, service]


def from_entries(entries: list[Entry]) -> Definitions:
    """Return the definitions that `definition_entries` found."""
    services = [entry.payload for entry in entries if entry.type == FeatureServiceApplied.__name__]
    views = [entry.payload for entry in entries if entry.type == FeatureViewApplied.__name__]
    return Definitions(
        service=services[-1] if services else None, views={payload["view"]: payload for payload in views}
    )


def matching_service(ledger: Ledger, origin: Definitions) -> str:
    """Return the version of this installation's service that has the same meaning; "" without a service.

    Raises:
        DefinitionsDiffer: The service or a view was not applied here, or has another meaning.
    """
    if origin.service is None:
        return ""
    name = origin.service["service"]
    own = ledger.newest(FeatureServiceApplied, service=name)
    if own is None:
        raise DefinitionsDiffer(
            f"The model reads the feature service '{name}', which is not applied here. Apply it with `python -m "
            "feature_jobs.apply definitions=…` first."
        )
    for part, words in _SAME.items():
        if (origin.service.get(part) or None) != (own.payload.get(part) or None):
            raise _differs(
                f"feature service '{name}'", f"its {words} differ{_which(part, origin.service, own.payload)}"
            )
    for view, version in own.payload["views"].items():
        applied = ledger.find(FeatureViewApplied, view=view, newest_first=True)
        newest = next(applied, None)
        if newest is None or newest.payload["version"] != version:
            raise _differs(f"feature view '{view}'", f"its newest version here is not the one of '{name}'")
        for problem in _problems(origin.views[view]["definition"], newest.payload["definition"]):
            raise _differs(f"feature view '{view}'", problem)
    return str(own.payload["version"])


def _problems(origin: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    for change in view_changes(origin, own):
        if change.impact.breaks:
            yield f"{change.subject} is {change.before} in the bundle and {change.after} here"
    if origin["ttl_s"] != own["ttl_s"]:
        yield f"its TTL is {origin['ttl_s']} s in the bundle and {own['ttl_s']} s here"


def _which(part: str, origin: dict[str, Any], own: dict[str, Any]) -> str:
    """Return the first on-demand transform that differs, with the hashes of its code."""
    if part != "on_demand":
        return ""
    theirs, ours = (
        {item["name"]: item for item in payload.get("on_demand", [])} for payload in (origin, own)
    )
    for name in dict.fromkeys([*theirs, *ours]):
        if theirs.get(name) != ours.get(name):
            return f": '{name}' has code {_code(theirs.get(name))} in the bundle and {_code(ours.get(name))} here"
    return ": their order is another one"


def _code(transform: dict[str, Any] | None) -> str:
    return "none" if transform is None else str(transform["transform"]["sha256"])[:8]


def _differs(what: str, problem: str) -> DefinitionsDiffer:
    return DefinitionsDiffer(
        f"The {what} has another meaning here than where the model was trained: {problem}. Apply the same definitions, "
        "or train the model here."
    )


def input_resources(origin: Definitions, *, model: str, region: str) -> list[Resource]:
    """Return the model as a resource of the policies, once for each column class of each view that it reads.

    Args:
        origin: The version's definitions.
        model: Name of the model.
        region: Region of the installation that trained it, for views without a region of their own.
    """
    resources = [Resource(kind="model", name=model, column_class="internal", region=region)]
    for payload in origin.views.values():
        definition = payload["definition"]
        resources += [
            Resource(
                kind="model",
                name=model,
                column_class=column_class,
                purposes=tuple(definition["purposes"]),
                region=definition["region"] or region,
            )
            for column_class in sorted({field["sensitivity"] for field in definition["schema"]})
        ]
    return list(dict.fromkeys(resources))


def column_classes(resources: list[Resource]) -> list[str]:
    """Return the classes of the columns behind a model, sorted."""
    return sorted({resource.column_class for resource in resources})
