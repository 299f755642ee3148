"""Names of the columns that the platform adds to a feature table."""

from __future__ import annotations

EVENT, CREATED, SEQ = "event_timestamp", "created_timestamp", "ingest_seq"
INGESTED, BUCKET = "ingested_at", "bucket"
"""Time of the batch that stored the row, and the bucket that contains the row."""
DELETED = "deleted"
"""Bool column that marks tombstones. Only tables of views with deletions have it; other tables have no tombstones."""
PROVISIONAL = 1 << 62
"""Offset of provisional sequence numbers. Until a pushed row has its `ingest_seq`, its number is this offset plus its
number in the push log. Such a number is greater than every `ingest_seq`. This keeps the order of rows, because the
row's own `ingest_seq` will be greater than all earlier ones."""
