"""Rows in quarantine: count them by batch, and turn them back into rows of the source.

A quarantined row is stored as JSON, together with the column types of its source. It is read back with the same types,
so that the view's transform and checks get the same values as at ingestion.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa

from cluster.errors import SourceError
from cluster.ledger import Entry, Ledger
from cluster.ledger.events import BatchIngested, BatchMended, QuarantineReplayed
from cluster.ledger.projection import Projection
from feature_jobs.store.ingestion.validation import SOURCE_SCHEMA

METADATA = sa.MetaData()
BATCHES = sa.Table(
    "quarantined_batches_1",
    METADATA,
    sa.Column("view", sa.String(256), primary_key=True),
    sa.Column("batch", sa.String(256), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("reasons", sa.Text, nullable=False),
)
"""Batches with rows in quarantine. A release whose rows for the same events differ gives the table another number."""
_TYPES = frozenset({BatchIngested.__name__, BatchMended.__name__, QuarantineReplayed.__name__})


def quarantined(ledger: Ledger, view: str) -> dict[str, dict[str, int]]:
    """Return the number of quarantined rows by batch and reason, in the order of ingestion.

    Batches of the view that have no row in quarantine are left out.
    """
    projection = Projection(
        ledger, name=BATCHES.name, metadata=METADATA, wanted=_TYPES.__contains__, apply=_apply
    )
    query = (
        sa.select(BATCHES.c.batch, BATCHES.c.reasons).where(BATCHES.c.view == view).order_by(BATCHES.c.seq)
    )
    with projection.reading() as connection:
        return {row.batch: json.loads(row.reasons) for row in connection.execute(query)}


def _apply(connection: sa.Connection, entry: Entry) -> None:
    """Store the newest counts of a batch, or remove the batch if it has no row in quarantine any more."""
    match entry.event():
        case BatchIngested() as event:
            if not event.rows_quarantined:
                return
            view, batch, reasons = event.view, event.ingest_id, event.reasons
        case QuarantineReplayed() | BatchMended() as event:
            view, batch, reasons = event.view, event.batch, event.reasons
        case _:
            return
    same_batch = (BATCHES.c.view == view) & (BATCHES.c.batch == batch)
    if not reasons:
        connection.execute(BATCHES.delete().where(same_batch))
        return
    text = json.dumps(reasons)
    if connection.execute(BATCHES.update().where(same_batch).values(reasons=text)).rowcount == 0:
        row = {"view": view, "batch": batch, "seq": entry.seq, "reasons": text}
        connection.execute(BATCHES.insert().values(row))


def source_schema(file: pa.Table) -> pa.Schema | None:
    """Return the column types of the source, which a quarantine file contains.

    Returns:
        None if the file has no types: its rows were pushed, or an older release wrote it.
    """
    encoded = (file.schema.field("raw").metadata or {}).get(SOURCE_SCHEMA)
    return None if encoded is None else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(encoded)))


def source_rows(file: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the rows of a quarantine file with the columns and types of the source.

    Raises:
        SourceError: a value cannot be read back.
    """
    rows = [json.loads(text) for text in file["raw"].to_pylist()]
    columns = [_column([row.get(field.name) for row in rows], field) for field in schema]
    return pa.table(columns, names=schema.names)


def _column(values: list[Any], field: pa.Field) -> pa.Array:
    kind = field.type
    try:
        if pa.types.is_dictionary(kind):
            return _plain_array(values, kind.value_type).dictionary_encode().cast(kind)
        return _plain_array(values, kind)
    except (pa.ArrowException, ValueError, TypeError, ArithmeticError) as error:
        raise SourceError(
            f"Column '{field.name}' of the quarantine cannot be read back as {kind}: {error}. "
            "Correct the rows at their source and ingest them from there."
        ) from error


def _plain_array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_time(kind):
        return pa.array([None if value is None else dt.time.fromisoformat(value) for value in values], kind)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _times(values, kind)
    if pa.types.is_decimal(kind):
        return pa.array([None if value is None else Decimal(value) for value in values], kind)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.array([None if value is None else base64.b64decode(value) for value in values], kind)
    return pa.array(values, kind)


def _times(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Return times from text, or from integers of their unit if Python could not print the time."""
    texts = pa.array([value if isinstance(value, str) else None for value in values], pa.string())
    integers = pa.array([value if isinstance(value, int) else None for value in values], pa.int64())
    numbers = integers.cast(pa.int32()) if pa.types.is_date32(kind) else integers
    return pc.coalesce(texts.cast(kind), numbers.cast(kind))
