"""Keys of a model's logs and scores, and permissions of its callers: as strict as for the features that it uses.

Outcomes and clients' values have no declared column class. So outcomes, and predictions of a model without a feature
service, are encrypted under a key of the class sensitive. A prediction says something about a person, so its class is
at least personal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.registry import ModelVersion
from cluster.security.authorization.policy import Resource
from cluster.security.keys.store import KeyInfo
from feature_jobs.store.catalog.protection import NO_COMMON_PURPOSE, view_resources
from feature_jobs.store.catalog.specifications import FieldSpec, ServiceSpec, ViewSpec, service_spec
from feature_jobs.store.definitions.views import Sensitivity


def prediction_key(ledger: Ledger, version: ModelVersion) -> str:
    """Return the name of the key that encrypts a version's predictions."""
    return f"predictions/{version.name}/{_log_class(_fields(ledger, version)).value}"


def scores_key(ledger: Ledger, version: ModelVersion, *, region: str) -> KeyInfo:
    """Return the key of files with a version's scores, as `jobs.score` writes them below the storage root.

    It has the class, purposes and region of the key of the version's predictions. It is another key, so that a job that
    may write scores cannot forge records of the prediction log.
    """
    info = log_keys(ledger, version, region=region)[0]
    return replace(info, name=f"scores/{version.name}/{info.column_class}")


def outcome_key(model: str) -> str:
    """Return the name of the key that encrypts a model's outcomes."""
    return f"outcomes/{model}/{Sensitivity.SENSITIVE.value}"


def log_keys(ledger: Ledger, version: ModelVersion, *, region: str) -> list[KeyInfo]:
    """Return the descriptions of the two keys that a deployment creates: one for predictions, one for outcomes.

    The purposes of the keys are those that all views of the version allow.

    Args:
        ledger: ledger with the definitions of the views.
        version: the version to deploy.
        region: the installation's region. If a view is in another region, that region is used.
    """
    views = _views(ledger, version)
    other_regions = sorted({view.region for view in views if view.region} - {region})
    return [
        KeyInfo(
            name=name,
            column_class=sensitivity.value,
            purposes=_common_purposes(views),
            region=other_regions[0] if other_regions else region,
        )
        for name, sensitivity in (
            (prediction_key(ledger, version), _log_class(_fields(ledger, version))),
            (outcome_key(version.name), Sensitivity.SENSITIVE),
        )
    ]


def merged_key(existing: KeyInfo, wanted: KeyInfo) -> KeyInfo:
    """Return the description of a key that other versions already use, with only the purposes that both allow.

    Raises:
        RefusedError: the two descriptions have no purpose in common, so no reader could get the key.
    """
    if not existing.purposes:
        return wanted
    common = set(wanted.purposes or existing.purposes) & set(existing.purposes)
    if not common:
        raise RefusedError(
            f"Records under key '{existing.name}' are for {', '.join(existing.purposes)}, but this version allows only "
            f"{', '.join(wanted.purposes)}. Register it as another model, which has its own log."
        )
    return replace(wanted, purposes=tuple(sorted(common)))


def serving_purpose(ledger: Ledger, version: ModelVersion) -> str:
    """Return the default purpose for which a version's replicas read features: one that all views allow."""
    return next(iter(_common_purposes(_views(ledger, version))), "")


def with_read_features(model: Resource, views: list[ViewSpec], *, region: str) -> Resource:
    """Return the model as a resource for `:predict`, which reads features by key.

    The resource has the highest column class of the views, and the purposes that all views list. If a view is in
    another region, the resource is in that region. So the policies require the same as for `features:read`.
    """
    resources = [resource for view in views for resource in view_resources(view, region=region)]
    other_regions = sorted({resource.region for resource in resources} - {region})
    return replace(
        model,
        column_class=_highest({Sensitivity(resource.column_class) for resource in resources}).value,
        region=other_regions[0] if other_regions else model.region,
        purposes=_common_purposes(resources),
    )


def column_resources(spec: ServiceSpec, *, region: str) -> dict[str, Resource]:
    """Return the resource of each column of a service, for the policies.

    A column of an on-demand transform may be used only for purposes that all views of the service allow.

    Args:
        spec: the service.
        region: the installation's region, for views without a region.
    """
    by_class = {
        (view.name, resource.column_class): resource
        for view in spec.views
        for resource in view_resources(view, region=region)
    }
    resources = {
        column: by_class[view.name, field.sensitivity]
        for view in spec.views
        for column, field in zip(view.columns, view.fields, strict=True)
    }
    purposes = _common_purposes(spec.views)
    for transform in spec.on_demand:
        for column, field in zip(transform.columns, transform.fields, strict=True):
            resources[column] = Resource(
                kind="feature service",
                name=spec.name,
                column_class=field.sensitivity,
                purposes=purposes,
                region=region,
            )
    return resources


def _common_purposes(limited: Sequence[ViewSpec] | Sequence[Resource]) -> tuple[str, ...]:
    """Return the purposes that all views or resources with purposes list. The tuple is empty if none lists any.

    If there is no such purpose, return `NO_COMMON_PURPOSE`.
    """
    listed = [set(item.purposes) for item in limited if item.purposes]
    if not listed:
        return ()
    return tuple(sorted(set.intersection(*listed))) or (NO_COMMON_PURPOSE,)


def _views(ledger: Ledger, version: ModelVersion) -> list[ViewSpec]:
    lineage = version.lineage
    return service_spec(ledger, lineage.service, lineage.service_version).views if lineage.service else []


def _fields(ledger: Ledger, version: ModelVersion) -> list[FieldSpec]:
    """Return all fields whose values the record of a prediction may contain."""
    lineage = version.lineage
    if not lineage.service:
        return []
    spec = service_spec(ledger, lineage.service, lineage.service_version)
    view_fields = [field for view in spec.views for field in view.fields]
    return view_fields + [
        field for transform in spec.on_demand for field in (*transform.inputs, *transform.fields)
    ]


def _log_class(fields: list[FieldSpec]) -> Sensitivity:
    if not fields:
        return Sensitivity.SENSITIVE
    return _highest({Sensitivity(field.sensitivity) for field in fields} | {Sensitivity.PERSONAL})


def _highest(classes: set[Sensitivity]) -> Sensitivity:
    return max(classes, key=list(Sensitivity).index)
