"""Which rows of a feature table are past their retention: those whose event is, and in a table of events what they
corrected.

A correction may have moved an event far back. Were it removed alone, the version that it corrected would count again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import polars as pl

from feature_jobs.store.definitions.aggregations import WindowSpec
from feature_jobs.store.offline.tables import Snapshot
from feature_jobs.store.types.schema import CREATED, EVENT, SEQ


def past_retention(pinned: Snapshot, windows: WindowSpec | None, oldest: datetime) -> pl.Expr:
    """True of the rows to remove.

    Args:
        pinned: the table's newest version.
        windows: of an aggregated view.
        oldest: the earliest event that is kept.
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
    """The `ingest_seq` of versions of events that are not old, but a later version is."""
    later = (pl.col(EVENT) < oldest).cum_max(reverse=True).shift(-1).over([*keys, event_id])
    marked = events.sort(CREATED, SEQ).with_columns(later.fill_null(False).alias("__later"))
    return marked.filter(pl.col("__later") & (pl.col(EVENT) >= oldest))[SEQ].to_list()
