"""Logs of predictions and outcomes: one prediction record per HTTP answer, and the outcomes that arrive later.

Replicas write with `segments`, and all readers use `reading`. `typed` converts a version's rows to the types of its
signature. `matching` joins predictions with their outcomes.
"""

from cluster.records.matching import Matched, match
from cluster.records.reading import (
    Log,
    all_outcomes,
    count_records,
    read_log,
    read_outcomes,
    read_predictions,
    read_records,
    read_shadow_predictions,
)
from cluster.records.schema import SHADOW, OutcomeRecord, PredictionRecord, Record
from cluster.records.segments import MAX_AGE_S, SegmentWriter
from cluster.records.typed import Typed, typed

__all__ = [
    "MAX_AGE_S",
    "Log",
    "Matched",
    "SHADOW",
    "OutcomeRecord",
    "PredictionRecord",
    "Record",
    "SegmentWriter",
    "Typed",
    "all_outcomes",
    "count_records",
    "match",
    "read_log",
    "read_outcomes",
    "read_predictions",
    "read_records",
    "read_shadow_predictions",
    "typed",
]
