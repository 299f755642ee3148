"""Which key each column of the feature store is under.

A column keeps its key on its whole way: in the feature table, and in every training set that it was joined into. So
whoever may not read it in one may not read it in the other. Join keys are internal: a reader of a table's public
columns alone needs no key at all, and a join needs the internal one. The columns that order rows are public; they say
nothing without the keys they belong to.
"""

from __future__ import annotations

from cluster.security.authorization.policy import Resource
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.store import KeyInfo
from feature_jobs.store.catalog.specifications import ServiceSpec, ViewSpec
from feature_jobs.store.definitions.services import FeatureService
from feature_jobs.store.definitions.views import FeatureView, Sensitivity

NO_COMMON_PURPOSE = "no-common-purpose"
"""Stands where views' purposes exclude each other, because an empty list would allow every purpose."""
ORDERING = ("event_timestamp", "created_timestamp", "ingested_at", "ingest_seq", "deleted")


def view_keys(view: FeatureView, *, region: str) -> list[KeyInfo]:
    """The keys of a view, as its definition describes them: those of its columns, offline and online, and those of its
    quarantine and push log.

    The internal keys, which join keys are under, serve every purpose.
    """
    classes = {field.sensitivity for field in view.schema} - {Sensitivity.PUBLIC, Sensitivity.INTERNAL}
    purposes, where = tuple(view.purposes), view.region or region
    return [
        *(
            KeyInfo(name=key_of(view.name, Sensitivity.INTERNAL), column_class="internal", region=where)
            for key_of in (features_key, online_key)
        ),
        *(
            KeyInfo(name=key_of(view.name, name), column_class=name.value, purposes=purposes, region=where)
            for key_of in (features_key, online_key)
            for name in sorted(classes)
        ),
        *(
            KeyInfo(name=name, column_class="sensitive", purposes=purposes, region=where)
            for name in (quarantine_protection(view.name).default, push_key(view.name))
        ),
    ]


def view_key_names(view: ViewSpec) -> list[str]:
    """The names of `view_keys`, from the view as it was applied."""
    classes = {Sensitivity(field.sensitivity) for field in view.stored} - {Sensitivity.PUBLIC}
    return [
        *(
            key_of(view.name, name)
            for key_of in (features_key, online_key)
            for name in sorted(classes | {Sensitivity.INTERNAL})
        ),
        quarantine_protection(view.name).default,
        push_key(view.name),
    ]


def service_keys(service: FeatureService, *, region: str) -> list[KeyInfo]:
    """The key of what entity rows bring along into a service's training sets, and those of what is made on demand.

    Values that are made of several views are for the purposes that all of them allow.
    """
    fields = [field for one in service.on_demand for field in (*one.inputs, *one.schema)]
    classes = {field.sensitivity for field in fields} - {Sensitivity.PUBLIC, Sensitivity.INTERNAL}
    stated = [set(view.purposes) for view in service.views if view.purposes]
    common = tuple(sorted(set.intersection(*stated))) if stated else ()
    return [
        KeyInfo(name=_service_key(service.name), column_class="internal", region=region),
        *(
            KeyInfo(
                name=_service_key(service.name, name),
                column_class=name.value,
                purposes=common if common or not stated else (NO_COMMON_PURPOSE,),
                region=region,
            )
            for name in sorted(classes)
        ),
    ]


def view_resources(view: ViewSpec, *, region: str) -> list[Resource]:
    """A view as the policies see it: its columns of each class."""
    return [
        Resource(
            kind="feature view",
            name=view.name,
            column_class=name,
            purposes=() if name in (Sensitivity.PUBLIC, Sensitivity.INTERNAL) else view.purposes,
            region=view.region or region,
        )
        for name in sorted({field.sensitivity for field in view.stored})
    ]


def features_key(view: str, sensitivity: Sensitivity) -> str:
    """The key of a view's columns of one class."""
    return f"features/{view}/{sensitivity.value}"


def push_key(view: str) -> str:
    """The key of a view's push log, which holds whole rows as they came."""
    return f"push/{view}/sensitive"


def view_protection(view: ViewSpec) -> Protection:
    """Of a view's feature table."""
    return Protection(
        default=features_key(view.name, Sensitivity.INTERNAL),
        keys=(
            *((name, None) for name in ORDERING),
            *((field.name, _key(view.name, field.sensitivity)) for field in view.stored),
        ),
    )


def quarantine_protection(view: str) -> Protection:
    """Of a view's quarantine, which holds whole rows as they came."""
    return Protection(
        default=f"quarantine/{view}/sensitive", keys=(("ingested_at", None), ("ingest_seq", None))
    )


def quarantine_place(view: str, batch: str) -> str:
    """Where the quarantine of one batch says it belongs. Files of earlier releases say nothing."""
    return f"{view}/quarantine/{batch}.parquet"


def training_set_protection(service: ServiceSpec) -> Protection:
    """Of a service's training sets: each feature under the key it has in its own table."""
    made: dict[str, str] = {}
    for one in service.on_demand:
        made |= {field.name: field.sensitivity for field in one.inputs}
        made |= {name: field.sensitivity for name, field in zip(one.columns, one.fields, strict=True)}
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
                for name, sensitivity in made.items()
            ),
        ),
    )


def _key(view: str, sensitivity: str) -> str | None:
    return None if sensitivity == Sensitivity.PUBLIC else features_key(view, Sensitivity(sensitivity))


def _service_key(service: str, sensitivity: str = Sensitivity.INTERNAL) -> str:
    return f"training_sets/{service}/{Sensitivity(sensitivity).value}"


def online_key(view: str, sensitivity: str) -> str:
    """The key of a view's online values of one class."""
    return f"online/{view}/{sensitivity}"
