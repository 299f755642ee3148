"""Store a checked batch: write its blocks as files of buckets, then commit all files at once in the driver."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cluster.errors import Inconsistent
from feature_jobs.batches.rules import BatchResult, CheckedBatch
from feature_jobs.batches.work import Work
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.validation import RAW, REASON
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.types.batch_profile import Profile
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
    [validated] = work.get([work.run(_schema, checked.blocks[0], num_cpus=0.1)])
    schema = stored_schema(validated)
    table = open_or_create(target, schema, view=quarantine.view)
    target = replace(target, buckets=offline.num_buckets(table))
    seq = offline.last_seq(table)
    parts = []
    for block, size in zip(checked.blocks, checked.sizes, strict=True):
        name = f"{ingest_id}-{uuid.uuid4().hex[:8]}"
        parts.append(work.run(_write, block, seq + 1, target, name))
        seq += size
    written: list[_WrittenBlock] = work.get(parts)
    return commit_batch(
        checked,
        ingest_id,
        table=table,
        files=[file for block in written for file in block.files],
        bad=pa.concat_tables([block.bad for block in written]),
        profile=checked.result.profile,
        schema=schema,
        quarantine=quarantine,
    )


class BatchSummary(Protocol):
    """A batch whose rows and batch rules were checked."""

    @property
    def rows(self) -> int: ...
    @property
    def reasons(self) -> dict[str, int]: ...
    @property
    def result(self) -> BatchResult: ...
    @property
    def columns(self) -> list[str]: ...


def commit_batch(
    checked: BatchSummary,
    ingest_id: str,
    *,
    table: DeltaTable,
    files: Sequence[offline.BucketFile],
    bad: pa.Table,
    profile: Profile,
    schema: pa.Schema,
    quarantine: QuarantineFiles,
) -> StoredBatch:
    """Write the bad rows and the profile to quarantine, then add the written files to the table.

    Args:
        checked: the batch.
        ingest_id: id of the batch.
        table: the version from which the sequence numbers were taken.
        files: files of the good rows.
        bad: rows for the quarantine.
        profile: the batch's complete profile.
        schema: schema of the good rows.
        quarantine: the view's quarantine.

    Raises:
        Inconsistent: the stored and quarantined rows do not add up to the batch's rows; nothing was committed.
        CommitConflict: another job committed at the same time. Nothing was stored.
    """
    batch = offline.Batch(
        ingest_id=ingest_id,
        rows_in=checked.rows,
        rows_stored=sum(file.rows for file in files),
        rows_quarantined=bad.num_rows,
        reasons=checked.reasons,
        quarantine=f"{ingest_id}.parquet" if bad.num_rows else None,
        profile=profile.summary(),
        findings=[asdict(finding) for finding in checked.result.findings],
        columns=checked.columns,
    )
    if batch.rows_stored + batch.rows_quarantined != batch.rows_in:
        raise Inconsistent(
            f"View '{quarantine.view}': {batch.rows_in} rows in are not {batch.rows_stored} stored + "
            f"{batch.rows_quarantined} quarantined. Nothing was committed."
        )
    if bad.num_rows:
        quarantine.write(ingest_id, bad)
    quarantine.write_profile(ingest_id, profile)
    seq = offline.last_seq(table) + checked.rows
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


def find_committed(target: offline.Target, ingest_id: str) -> StoredBatch | None:
    """Return a planned batch if an earlier command committed it but was killed before it appended the event."""
    table = offline.open_table(target.uri)
    committed = None if table is None else offline.find_committed_batch(table, ingest_id)
    return None if committed is None else StoredBatch(*committed)


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
    good, bad = split_rows(block, first_seq)
    files = offline.write_files(with_time(good), target, name=name) if good.num_rows else []
    return _WrittenBlock(files, with_time(bad))


def split_rows(block: pa.Table, first_seq: int) -> tuple[pa.Table, pa.Table]:
    """Return the good rows, and the bad rows in the form of a quarantine file, both with their `ingest_seq`.

    Args:
        block: a validated block.
        first_seq: the `ingest_seq` of its first row.
    """
    numbers = pa.array(np.arange(first_seq, first_seq + block.num_rows, dtype=np.int64))
    block = block.append_column(SEQ, numbers)
    good = block.filter(pc.is_null(block[REASON])).drop_columns([REASON, RAW])
    bad = block.filter(pc.is_valid(block[REASON])).select([REASON, RAW, SEQ])
    return good, bad.rename_columns(["reason", "raw", SEQ])


def with_time(rows: pa.Table) -> pa.Table:
    """Return rows with the time of their storing, as the column before `ingest_seq`, which is the last one."""
    now = pa.repeat(pa.scalar(dt.datetime.now(dt.UTC), offline.TIMESTAMP), rows.num_rows)
    return rows.add_column(rows.num_columns - 1, INGESTED, now)
