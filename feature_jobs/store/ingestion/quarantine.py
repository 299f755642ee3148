"""Rows that failed: which lie in quarantine, by batch, and how they become rows of the source again.

A quarantined row is kept as JSON beside the types that the source had. Read again it is of the same types, so that the
view's transform and checks see what they would have seen at ingestion.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import SourceError
from cluster.ledger.events import BatchIngested, BatchMended, LedgerEvent, QuarantineReplayed
from feature_jobs.store.ingestion.validation import SOURCE_SCHEMA


def quarantined(events: Iterable[LedgerEvent], view: str) -> dict[str, dict[str, int]]:
    """Rows in quarantine by reason, of each batch of a view that has any, in the order of ingestion."""
    batches: dict[str, dict[str, int]] = {}
    for event in events:
        match event:
            case BatchIngested(view=name) if name == view and event.rows_quarantined:
                batches[event.ingest_id] = dict(event.reasons)
            case QuarantineReplayed(view=name) | BatchMended(view=name) if name == view:
                batches[event.batch] = dict(event.reasons)
    return {batch: reasons for batch, reasons in batches.items() if reasons}


def source_schema(file: pa.Table) -> pa.Schema | None:
    """The types that a file's rows had in their source; none for rows that were pushed, or kept by an older release."""
    kept = (file.schema.field("raw").metadata or {}).get(SOURCE_SCHEMA)
    return None if kept is None else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(kept)))


def source_rows(file: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows of a quarantine file as the source had them.

    Raises:
        SourceError: a value that cannot be read back.
    """
    rows = [json.loads(text) for text in file["raw"].to_pylist()]
    columns = [_column([row.get(field.name) for row in rows], field) for field in schema]
    return pa.table(columns, names=schema.names)


def _column(values: list[Any], field: pa.Field) -> pa.Array:
    kind = field.type
    try:
        if pa.types.is_dictionary(kind):
            return _plain(values, kind.value_type).dictionary_encode().cast(kind)
        return _plain(values, kind)
    except (pa.ArrowException, ValueError, TypeError, ArithmeticError) as error:
        raise SourceError(
            f"Column '{field.name}' of the quarantine cannot be read back as {kind}: {error}. "
            "Mend the rows at their source and ingest them from there."
        ) from error


def _plain(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_time(kind):
        return pa.array([None if one is None else dt.time.fromisoformat(one) for one in values], kind)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _times(values, kind)
    if pa.types.is_decimal(kind):
        return pa.array([None if one is None else Decimal(one) for one in values], kind)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.array([None if one is None else base64.b64decode(one) for one in values], kind)
    return pa.array(values, kind)


def _times(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Times from text, or, where Python could not print them, from numbers of their unit."""
    texts = pa.array([one if isinstance(one, str) else None for one in values], pa.string())
    counts = pa.array([one if isinstance(one, int) else None for one in values], pa.int64())
    numbers = counts.cast(pa.int32()) if pa.types.is_date32(kind) else counts
    return pc.coalesce(texts.cast(kind), numbers.cast(kind))
