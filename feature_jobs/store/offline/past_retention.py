"""Select the rows of a feature table that are past their retention.

A row is past retention when its event time is too old. In a table of events, the older versions of an event are also
past retention if its correction is too old. A correction may move an event far into the past. If only the correction
were removed, readers would use the corrected version again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import polars as pl

from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.types.schema import CREATED, EVENT, SEQ


def past_retention(pinned: Snapshot, windows: WindowSpec | None, oldest: datetime) -> pl.Expr:
    """Return an expression that is true for the rows to remove.

    Args:
        pinned: the newest version of the table.
        windows: the aggregations of an aggregated view, None for another view.
        oldest: event time of the oldest rows that stay.
    """
    old = pl.col(EVENT) < oldest
    if windows is None:
        return old
    corrected: list[int] = []
    for bucket in range(pinned.num_buckets):
        events = pinned.read(bucket, [windows.event_id])
        if not events.is_empty():
            corrected += corrected_by_old(events, list(pinned.key_types), windows.event_id, oldest)
    return old | pl.col(SEQ).is_in(corrected) if corrected else old


def corrected_by_old(events: pl.DataFrame, keys: Sequence[str], event_id: str, oldest: datetime) -> list[int]:
    """Return the `ingest_seq` of event versions that are not old themselves but have a later version that is old."""
    later = (pl.col(EVENT) < oldest).cum_max(reverse=True).shift(-1).over([*keys, event_id])
    marked = events.sort(CREATED, SEQ).with_columns(later.fill_null(False).alias("__later"))
    return marked.filter(pl.col("__later") & (pl.col(EVENT) >= oldest))[SEQ].to_list()
