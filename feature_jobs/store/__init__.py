"""The feature store: definitions, offline tables, the point-in-time join, the online store."""

from feature_jobs.store.aggregations import Aggregation
from feature_jobs.store.checks import Allowed, Check, NotNull, Range
from feature_jobs.store.definitions import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    Sensitivity,
    Transform,
)

__all__ = [
    "Aggregation",
    "Allowed",
    "Check",
    "Entity",
    "FeatureService",
    "FeatureView",
    "Field",
    "FileSource",
    "NotNull",
    "Range",
    "Sensitivity",
    "Transform",
]
