"""Names and types of the columns that the platform adds to a feature table."""

from __future__ import annotations

EVENT, CREATED, SEQ = "event_timestamp", "created_timestamp", "ingest_seq"
DELETED = "deleted"
"""Bool column of tombstones, in the tables of views that have them; a frame without it holds none."""
PROVISIONAL = 1 << 62
"""Added to a pushed row's number in the push log until the row has an `ingest_seq`: greater than every one of those,
as the row's own will be greater than all that were given out before."""
