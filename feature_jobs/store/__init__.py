"""The feature store: definitions, offline tables, the point-in-time join, the online store."""

from feature_jobs.store.definitions.aggregations import Aggregation
from feature_jobs.store.definitions.batch_checks import (
    Drift,
    Freshness,
    Keep,
    NullShare,
    Outlier,
    RowCount,
    Unique,
)
from feature_jobs.store.definitions.checks import Allowed, Check, NotNull, Pattern, Range
from feature_jobs.store.definitions.kafka_source import KafkaSource
from feature_jobs.store.definitions.missing import Default, Missing
from feature_jobs.store.definitions.services import FeatureService, OnDemandTransform
from feature_jobs.store.definitions.sources import FileSource, SqlSource
from feature_jobs.store.definitions.views import (
    Entity,
    FeatureView,
    Field,
    Sensitivity,
    Transform,
)

__all__ = [
    "Aggregation",
    "Allowed",
    "Check",
    "Default",
    "Drift",
    "Entity",
    "FeatureService",
    "FeatureView",
    "Field",
    "FileSource",
    "KafkaSource",
    "Freshness",
    "Keep",
    "Missing",
    "NotNull",
    "NullShare",
    "OnDemandTransform",
    "Outlier",
    "Pattern",
    "Range",
    "RowCount",
    "Sensitivity",
    "SqlSource",
    "Transform",
    "Unique",
]
