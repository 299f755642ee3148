"""Store a checked batch: write its blocks as files of buckets, then commit all files at once in the driver."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import asdict
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cluster.errors import Inconsistent
from feature_jobs.batches.rules import CheckedBatch
from feature_jobs.batches.work import Work
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.validation import RAW, REASON
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.types.schema import INGESTED, SEQ


class StoredBatch(NamedTuple):
    """A batch in the table, and the table version that contains it."""

    batch: offline.Batch
    table_version: int


def store(
    checked: CheckedBatch,
    ingest_id: str,
    *,
    target: offline.Target,
    quarantine: QuarantineFiles,
    work: Work,
) -> StoredBatch:
    """Write the good rows to their buckets and the bad rows to quarantine, then commit.

    Raises:
        Inconsistent: the stored and quarantined rows do not add up to the batch's rows; nothing was committed.
    """
    view = quarantine.view
    [validated] = work.get([work.run(_schema, checked.blocks[0], num_cpus=0.1)])
    schema = stored_schema(validated)
    table = open_or_create(target, schema, view=view)
    seq = offline.last_seq(table)
    parts = []
    for block, size in zip(checked.blocks, checked.sizes, strict=True):
        name = f"{ingest_id}-{uuid.uuid4().hex[:8]}"
        parts.append(work.run(_write, block, seq + 1, target, name))
        seq += size
    written: list[_WrittenBlock] = work.get(parts)
    files = [file for block in written for file in block.files]
    bad = pa.concat_tables([block.bad for block in written])
    batch = offline.Batch(
        ingest_id=ingest_id,
        rows_in=checked.rows,
        rows_stored=sum(file.rows for file in files),
        rows_quarantined=bad.num_rows,
        reasons=checked.reasons,
        quarantine=f"{ingest_id}.parquet" if bad.num_rows else None,
        profile=checked.result.profile.summary(),
        findings=[asdict(finding) for finding in checked.result.findings],
        columns=checked.columns,
    )
    if batch.rows_stored + batch.rows_quarantined != batch.rows_in:
        raise Inconsistent(
            f"View '{view}': {batch.rows_in} rows in are not {batch.rows_stored} stored + "
            f"{batch.rows_quarantined} quarantined. Nothing was committed."
        )
    if bad.num_rows:
        quarantine.write(ingest_id, bad)
    quarantine.write_profile(ingest_id, checked.result.profile)
    return StoredBatch(batch, offline.commit(table, schema, files, batch, seq=seq))


def open_or_create(target: offline.Target, schema: pa.Schema, *, view: str) -> DeltaTable:
    """Open a view's table, or create it. Add the columns of `schema` that the table lacks.

    Raises:
        SchemaMismatch: a column has another type in the table.
    """
    table = offline.open_table(target.uri)
    if table is None:
        table = offline.create_table(target.uri, schema, num_buckets=target.buckets)
    offline.evolve_schema(table, schema, view=view)
    return DeltaTable(target.uri)


def empty_batch(ingest_id: str, columns: list[str]) -> offline.Batch:
    """Return the batch for a source or chunk that has no rows."""
    return offline.Batch(
        ingest_id=ingest_id,
        rows_in=0,
        rows_stored=0,
        rows_quarantined=0,
        reasons={},
        quarantine=None,
        columns=columns,
    )


def stored_schema(validated: pa.Schema) -> pa.Schema:
    """Return the schema in which validated rows are stored."""
    columns = [column for column in validated if column.name not in (REASON, RAW)]
    return pa.schema([*columns, pa.field(INGESTED, offline.TIMESTAMP), pa.field(SEQ, pa.int64())])


class _WrittenBlock(NamedTuple):
    files: list[offline.BucketFile]
    bad: pa.Table
    """Rows for the quarantine."""


def _schema(block: pa.Table) -> pa.Schema:
    return block.schema


def _write(block: pa.Table, first_seq: int, target: offline.Target, name: str) -> _WrittenBlock:
    now = pa.scalar(dt.datetime.now(dt.UTC), offline.TIMESTAMP)
    num_rows = block.num_rows
    block = block.append_column(INGESTED, pa.repeat(now, num_rows))
    block = block.append_column(SEQ, pa.array(range(first_seq, first_seq + num_rows), pa.int64()))
    good = block.filter(pc.is_null(block[REASON])).drop_columns([REASON, RAW])
    bad = block.filter(pc.is_valid(block[REASON])).select([REASON, RAW, INGESTED, SEQ])
    files = offline.write_files(good, target, name=name) if good.num_rows else []
    return _WrittenBlock(files, bad.rename_columns(["reason", "raw", INGESTED, SEQ]))
