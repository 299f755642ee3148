"""Storing a checked batch: its blocks are written to their buckets, then the driver commits them all at once."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cluster.errors import Inconsistent
from cluster.security.encryption.access import protected_files
from feature_jobs.batches.judging import Judged, keep
from feature_jobs.batches.work import Block, Work
from feature_jobs.store.catalog.protection import quarantine_place, quarantine_protection
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.validation import RAW, REASON
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.types.schema import SEQ


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A batch after transform and checks: its blocks in source order."""

    blocks: list[Block]
    """Validated tables."""
    sizes: list[int]
    reasons: dict[str, int]
    judged: Judged
    columns: list[str]
    """Of the source."""

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def rows_bad(self) -> int:
        return sum(self.reasons.values())


def store(
    view: FeatureView,
    checked: Checked,
    ingest_id: str,
    *,
    target: offline.Target,
    quarantine: str,
    work: Work,
) -> tuple[offline.Batch, int]:
    """Write the good rows to their buckets and the bad ones to quarantine, then commit.

    Raises:
        Inconsistent: rows in are not rows stored and quarantined; nothing was committed.
    """
    [validated] = work.get([work.run(_schema, checked.blocks[0], num_cpus=0.1)])
    schema = row_schema(validated)
    table = open_or_create(target, schema, view=view.name)
    seq = offline.last_seq(table)
    parts = []
    for block, size in zip(checked.blocks, checked.sizes, strict=True):
        name = f"{ingest_id}-{uuid.uuid4().hex[:8]}"
        parts.append(work.run(_write, block, seq + 1, target, name))
        seq += size
    written = work.get(parts)
    files = [file for of_block, _ in written for file in of_block]
    bad = pa.concat_tables([rows for _, rows in written])
    batch = offline.Batch(
        ingest_id=ingest_id,
        rows_in=sum(checked.sizes),
        rows_stored=sum(file.rows for file in files),
        rows_quarantined=bad.num_rows,
        reasons=checked.reasons,
        quarantine=f"{ingest_id}.parquet" if bad.num_rows else None,
        profile=checked.judged.profile.summary(),
        findings=[asdict(finding) for finding in checked.judged.findings],
        columns=checked.columns,
    )
    if batch.rows_stored + batch.rows_quarantined != batch.rows_in:
        raise Inconsistent(
            f"View '{view.name}': {batch.rows_in} rows in are not {batch.rows_stored} stored + "
            f"{batch.rows_quarantined} quarantined. Nothing was committed."
        )
    if batch.quarantine is not None:
        protection, place = quarantine_protection(view.name), quarantine_place(view.name, ingest_id)
        protected_files(target.access).write(bad, f"{quarantine}/{batch.quarantine}", protection, place=place)
    keep(checked.judged.profile, view, ingest_id, quarantine=quarantine, access=target.access)
    return batch, offline.commit(table, schema, files, batch, seq=seq)


def open_or_create(target: offline.Target, schema: pa.Schema, *, view: str) -> DeltaTable:
    """The table, made where there is none, with a column for each of the schema's.

    Raises:
        SchemaMismatch: a column of another type than the table's.
    """
    table = offline.open_table(target.uri)
    if table is None:
        table = offline.create_table(target.uri, schema, num_buckets=target.buckets)
    offline.check_schema(table, schema, view=view)
    return DeltaTable(target.uri)


def nothing(ingest_id: str, columns: list[str]) -> offline.Batch:
    """A source or a chunk without rows."""
    return offline.Batch(
        ingest_id=ingest_id,
        rows_in=0,
        rows_stored=0,
        rows_quarantined=0,
        reasons={},
        quarantine=None,
        columns=columns,
    )


def row_schema(validated: pa.Schema) -> pa.Schema:
    """The stored columns of validated rows."""
    kept = [column for column in validated if column.name not in (REASON, RAW)]
    return pa.schema([*kept, pa.field(offline.INGESTED, offline.TIMESTAMP), pa.field(SEQ, pa.int64())])


def _schema(block: pa.Table) -> pa.Schema:
    return block.schema


def _write(
    block: pa.Table, first_seq: int, target: offline.Target, name: str
) -> tuple[list[offline.BucketFile], pa.Table]:
    now = pa.scalar(dt.datetime.now(dt.UTC), offline.TIMESTAMP)
    count = block.num_rows
    block = block.append_column(offline.INGESTED, pa.repeat(now, count))
    block = block.append_column(SEQ, pa.array(range(first_seq, first_seq + count), pa.int64()))
    good = block.filter(pc.is_null(block[REASON])).drop_columns([REASON, RAW])
    bad = block.filter(pc.is_valid(block[REASON])).select([REASON, RAW, offline.INGESTED, SEQ])
    bad = bad.rename_columns(["reason", "raw", offline.INGESTED, SEQ])
    return offline.write_files(good, target, name=name) if good.num_rows else [], bad
