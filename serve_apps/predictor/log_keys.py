"""What a model's features ask of its log's keys and of its callers: as guarded as what they were made from.

What clients bring along has no declared class, nor has an outcome, so a model without a feature service and every log
of outcomes are under a sensitive key. A prediction says something about a person: its log is never below personal.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.registry import ModelVersion
from cluster.security.authorization.policy import Resource
from cluster.security.keys.store import KeyInfo
from feature_jobs.store.catalog.protection import NO_COMMON_PURPOSE, view_resources
from feature_jobs.store.catalog.specifications import FieldSpec, ViewSpec, service_spec
from feature_jobs.store.definitions.views import Sensitivity


def prediction_key(ledger: Ledger, version: ModelVersion) -> str:
    """The name of the key that a version's replicas write under."""
    return f"predictions/{version.name}/{_log_class(_fields(ledger, version)).value}"


def outcome_key(model: str) -> str:
    """The name of the key that a model's outcomes are written under."""
    return f"outcomes/{model}/{Sensitivity.SENSITIVE.value}"


def log_keys(ledger: Ledger, version: ModelVersion, *, region: str) -> list[KeyInfo]:
    """Both keys, to be made when the version is deployed: for the purposes that all its views allow.

    Args:
        ledger: knows the views.
        version: what is deployed.
        region: where it is; a view's own region counts before it.
    """
    views = _views(ledger, version)
    elsewhere = sorted({view.region for view in views if view.region} - {region})
    return [
        KeyInfo(
            name=name,
            column_class=sensitivity.value,
            purposes=_common_purposes(views),
            region=elsewhere[0] if elsewhere else region,
        )
        for name, sensitivity in (
            (prediction_key(ledger, version), _log_class(_fields(ledger, version))),
            (outcome_key(version.name), Sensitivity.SENSITIVE),
        )
    ]


def within(present: KeyInfo, wanted: KeyInfo) -> KeyInfo:
    """The description for a key that other versions write under already: their records stay for their purposes.

    Raises:
        RefusedError: the two have no purpose in common, so that nobody could read either's records.
    """
    if not present.purposes:
        return wanted
    common = set(wanted.purposes or present.purposes) & set(present.purposes)
    if not common:
        raise RefusedError(
            f"What is logged under '{present.name}' is for {', '.join(present.purposes)}, and this version allows "
            f"{', '.join(wanted.purposes)} alone. Register it as another model, whose log is its own."
        )
    return replace(wanted, purposes=tuple(sorted(common)))


def serving_purpose(ledger: Ledger, version: ModelVersion) -> str:
    """What a version's replicas read features for, unless its deployment says: a purpose that all its views allow."""
    return next(iter(_common_purposes(_views(ledger, version))), "")


def with_read_features(model: Resource, views: list[ViewSpec], *, region: str) -> Resource:
    """A model as a caller of `:predict` uses it, for whom features are read by key.

    It is of the highest class among those of the views, for the purposes that all of them list, and in the region of a
    view that has one of its own. So the policies ask the same as at `features:read`.
    """
    used = [one for view in views for one in view_resources(view, region=region)]
    elsewhere = sorted({one.region for one in used} - {region})
    stated = [set(one.purposes) for one in used if one.purposes]
    common = tuple(sorted(set.intersection(*stated))) if stated else ()
    return replace(
        model,
        column_class=_highest({Sensitivity(one.column_class) for one in used}).value,
        region=elsewhere[0] if elsewhere else model.region,
        purposes=common or ((NO_COMMON_PURPOSE,) if stated else ()),
    )


def _common_purposes(views: list[ViewSpec]) -> tuple[str, ...]:
    stated = [set(view.purposes) for view in views if view.purposes]
    common = sorted(set.intersection(*stated)) if stated else []
    return tuple(common if common or not stated else [NO_COMMON_PURPOSE])


def _views(ledger: Ledger, version: ModelVersion) -> list[ViewSpec]:
    lineage = version.lineage
    return service_spec(ledger, lineage.service, lineage.service_version).views if lineage.service else []


def _fields(ledger: Ledger, version: ModelVersion) -> list[FieldSpec]:
    """All that a prediction's record may hold."""
    lineage = version.lineage
    if not lineage.service:
        return []
    spec = service_spec(ledger, lineage.service, lineage.service_version)
    made = [field for one in spec.on_demand for field in (*one.inputs, *one.fields)]
    return [*(field for view in spec.views for field in view.fields), *made]


def _log_class(fields: list[FieldSpec]) -> Sensitivity:
    if not fields:
        return Sensitivity.SENSITIVE
    return _highest({Sensitivity(field.sensitivity) for field in fields} | {Sensitivity.PERSONAL})


def _highest(classes: set[Sensitivity]) -> Sensitivity:
    return max(classes, key=list(Sensitivity).index)
