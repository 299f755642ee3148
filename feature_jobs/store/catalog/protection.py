"""Encryption keys of the feature store's columns.

A column has the same key in its feature table and in every training set. So a principal that may not read it in the
table may not read it in a training set either. Join keys are internal: reading only public columns of a table needs no
key, and a join needs the internal key. The columns that order rows are public, because without the join keys they
reveal nothing about an entity.
"""

from __future__ import annotations

from cluster.security.authorization.policy import Resource
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.store import KeyInfo
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec
from feature_jobs.store.definitions.services import FeatureService
from feature_jobs.store.definitions.views import FeatureView, Sensitivity
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, INGESTED, SEQ

NO_COMMON_PURPOSE = "no-common-purpose"
"""Purpose of a value that is computed from views without a common purpose. An empty list would allow all purposes."""
ORDERING = (EVENT, CREATED, INGESTED, SEQ, DELETED)
"""Public columns: when a row was true, known and stored, its sequence number, and whether it is a tombstone."""


def view_keys(view: FeatureView, *, region: str) -> list[KeyInfo]:
    """Return the keys that a view needs: for its columns offline and online, its quarantine and its push log.

    Join keys are protected by the internal keys. These allow every purpose.

    Args:
        view: The view.
        region: The cluster's region, for views without a region.
    """
    classes = {field.sensitivity for field in view.schema} - {Sensitivity.PUBLIC, Sensitivity.INTERNAL}
    purposes, key_region = tuple(view.purposes), view.region or region
    return [
        *(
            KeyInfo(name=key_of(view.name, Sensitivity.INTERNAL), column_class="internal", region=key_region)
            for key_of in (features_key, online_key)
        ),
        *(
            KeyInfo(
                name=key_of(view.name, column_class),
                column_class=column_class.value,
                purposes=purposes,
                region=key_region,
            )
            for key_of in (features_key, online_key)
            for column_class in sorted(classes)
        ),
        *(
            KeyInfo(name=name, column_class="sensitive", purposes=purposes, region=key_region)
            for name in (quarantine_protection(view.name).default, push_key(view.name))
        ),
    ]


def view_key_names(view: ViewSpec) -> list[str]:
    """Return the names of the keys that `view_keys` returns, from the view's specification."""
    classes = {Sensitivity(field.sensitivity) for field in view.stored} - {Sensitivity.PUBLIC}
    return [
        *(
            key_of(view.name, column_class)
            for key_of in (features_key, online_key)
            for column_class in sorted(classes | {Sensitivity.INTERNAL})
        ),
        quarantine_protection(view.name).default,
        push_key(view.name),
    ]


def service_keys(service: FeatureService, *, region: str) -> list[KeyInfo]:
    """Return the keys of a service's training sets: for columns of the entity rows, and for on-demand features.

    A value that is computed from several views may be used only for purposes that all these views allow.

    Args:
        service: The service.
        region: The cluster's region.
    """
    fields = [field for transform in service.on_demand for field in (*transform.inputs, *transform.schema)]
    classes = {field.sensitivity for field in fields} - {Sensitivity.PUBLIC, Sensitivity.INTERNAL}
    declared = [set(view.purposes) for view in service.views if view.purposes]
    common = tuple(sorted(set.intersection(*declared))) if declared else ()
    return [
        KeyInfo(name=_service_key(service.name), column_class="internal", region=region),
        *(
            KeyInfo(
                name=_service_key(service.name, column_class),
                column_class=column_class.value,
                purposes=common if common or not declared else (NO_COMMON_PURPOSE,),
                region=region,
            )
            for column_class in sorted(classes)
        ),
    ]


def view_resources(view: ViewSpec, *, region: str) -> list[Resource]:
    """Return a view's resources for the policies, one per column class.

    Args:
        view: The view.
        region: The cluster's region, for views without a region.
    """
    return [
        Resource(
            kind="feature view",
            name=view.name,
            column_class=column_class,
            purposes=() if column_class in (Sensitivity.PUBLIC, Sensitivity.INTERNAL) else view.purposes,
            region=view.region or region,
        )
        for column_class in sorted({field.sensitivity for field in view.stored})
    ]


def features_key(view: str, sensitivity: Sensitivity) -> str:
    """Return the name of the key that encrypts one column class of a view in its feature table."""
    return f"features/{view}/{sensitivity.value}"


def push_key(view: str) -> str:
    """Return the name of the key that encrypts a view's push log. The log contains whole rows."""
    return f"push/{view}/sensitive"


def view_protection(view: ViewSpec) -> Protection:
    """Return which key encrypts each column of a view's feature table."""
    return Protection(
        default=features_key(view.name, Sensitivity.INTERNAL),
        keys=(
            *((name, None) for name in ORDERING),
            *((field.name, _key(view.name, field.sensitivity)) for field in view.stored),
        ),
    )


def quarantine_protection(view: str) -> Protection:
    """Return which key encrypts each column of a view's quarantine. It contains rows as the source had them."""
    return Protection(default=f"quarantine/{view}/sensitive", keys=((INGESTED, None), (SEQ, None)))


def quarantine_aad(view: str, batch: str) -> str:
    """Return the AAD of the quarantine file of one batch. Files of earlier releases have no AAD."""
    return f"{view}/quarantine/{batch}.parquet"


def training_set_protection(service: ServiceSpec) -> Protection:
    """Return which key encrypts each column of a service's training sets. Features have their feature tables' keys."""
    on_demand: dict[str, str] = {}
    for transform in service.on_demand:
        on_demand |= {field.name: field.sensitivity for field in transform.inputs}
        on_demand |= {
            name: field.sensitivity for name, field in zip(transform.columns, transform.fields, strict=True)
        }
    return Protection(
        default=_service_key(service.name),
        keys=(
            *(
                (column, _key(view.name, field.sensitivity))
                for view in service.views
                for column, field in zip(view.columns, view.fields, strict=True)
            ),
            *(
                (name, None if sensitivity == Sensitivity.PUBLIC else _service_key(service.name, sensitivity))
                for name, sensitivity in on_demand.items()
            ),
        ),
    )


def _key(view: str, sensitivity: str) -> str | None:
    return None if sensitivity == Sensitivity.PUBLIC else features_key(view, Sensitivity(sensitivity))


def _service_key(service: str, sensitivity: str = Sensitivity.INTERNAL) -> str:
    return f"training_sets/{service}/{Sensitivity(sensitivity).value}"


def online_key(view: str, sensitivity: str) -> str:
    """Return the name of the key that encrypts one column class of a view's online values."""
    return f"online/{view}/{sensitivity}"
