"""What replicas write down: one prediction record per HTTP answer, and the outcomes that come later.

`segments` is how a replica writes, `reading` how everybody reads.
"""

from cluster.records.reading import (
    count_records,
    read_outcomes,
    read_predictions,
    read_records,
    read_shadow_predictions,
)
from cluster.records.schema import SHADOW, OutcomeRecord, PredictionRecord, Record
from cluster.records.segments import MAX_AGE_S, SegmentWriter

__all__ = [
    "MAX_AGE_S",
    "SHADOW",
    "OutcomeRecord",
    "PredictionRecord",
    "Record",
    "SegmentWriter",
    "count_records",
    "read_outcomes",
    "read_predictions",
    "read_records",
    "read_shadow_predictions",
]
