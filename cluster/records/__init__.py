"""Logs of predictions and outcomes: one prediction record per HTTP answer, and the outcomes that arrive later.

Replicas write with `segments`, and all readers use `reading`. `location` says where a log is, and `upload` moves closed
segments to a remote storage root. `signature_types` converts a version's rows to the types
of its signature. `matching` joins predictions with their outcomes.
"""

from cluster.records.location import LogLocation, outcome_log, prediction_log
from cluster.records.matching import MatchedAnswers, match_outcomes
from cluster.records.progress import LogAge, log_age
from cluster.records.reading import (
    Log,
    count_records,
    iter_outcomes,
    read_log,
    read_outcomes,
    read_predictions,
    read_records,
    read_shadow_predictions,
)
from cluster.records.schema import SHADOW, OutcomeRecord, PredictionRecord, Record
from cluster.records.segments import SegmentWriter
from cluster.records.signature_types import TypedRows, to_typed_rows

__all__ = [
    "Log",
    "LogAge",
    "LogLocation",
    "MatchedAnswers",
    "SHADOW",
    "OutcomeRecord",
    "PredictionRecord",
    "Record",
    "SegmentWriter",
    "TypedRows",
    "iter_outcomes",
    "count_records",
    "log_age",
    "match_outcomes",
    "outcome_log",
    "prediction_log",
    "read_log",
    "read_outcomes",
    "read_predictions",
    "read_records",
    "read_shadow_predictions",
    "to_typed_rows",
]
