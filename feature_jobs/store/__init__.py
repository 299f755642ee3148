"""The feature store: definitions, offline tables, the point-in-time join, the online store."""

from feature_jobs.store.aggregations import Aggregation
from feature_jobs.store.batch_checks import Drift, Freshness, Keep, NullShare, Outlier, RowCount, Unique
from feature_jobs.store.checks import Allowed, Check, NotNull, Pattern, Range
from feature_jobs.store.definitions import (
    Entity,
    FeatureView,
    Field,
    Sensitivity,
    Transform,
)
from feature_jobs.store.kafka_source import KafkaSource
from feature_jobs.store.missing import Default, Missing
from feature_jobs.store.services import FeatureService, OnDemandTransform
from feature_jobs.store.sources import FileSource, SqlSource

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
