"""Feature tables: Delta tables with buckets by entity hash, each file sorted by availability.

Workers write the Parquet files; the driver commits them in one Delta transaction. The commit stores the batch's id and
the last `ingest_seq` as application transactions. So no batch can be committed twice, and two concurrent ingestions
cannot use the same sequence numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from cluster.errors import CommitConflict, SchemaMismatch, TrainingSetError
from cluster.known_fields import known_fields
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import ProtectedFile, Protection
from cluster.security.keys.access import KeyAccess
from feature_jobs.store.offline.buckets import split_by_bucket
from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.types.casting import same_type
from feature_jobs.store.types.columns import select_or_null
from feature_jobs.store.types.schema import BUCKET, CREATED, DELETED, EVENT, SEQ

TIMESTAMP = pa.timestamp("us", "UTC")
_SEQ_APP, _BATCH_APP = "falaj.seq", "falaj.batch."
_BUCKETS_KEY, _BATCH_KEY = "falaj.buckets", "falaj.batch"
BUCKETS_APP = "falaj.buckets"
"""Application id whose number is the number of buckets since the last rebucketing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketFile:
    """A file of one bucket."""

    path: str
    """Relative to the table."""
    bucket: int
    rows: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a commit records about its batch."""

    ingest_id: str
    rows_in: int
    rows_stored: int
    rows_quarantined: int
    reasons: dict[str, int]
    """Number of quarantined rows by reason."""
    quarantine: str | None
    """Name of the quarantine file; None if no row was quarantined."""
    profile: dict[str, Any] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    """Columns of the source."""
    rows_late: int = 0
    """Number of rows of a stream that are later than the stream's limit allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One version of a feature table, as plain data. Any worker can read the table with it."""

    uri: str
    version: int
    num_buckets: int
    key_types: dict[str, str]
    """Type of each join key: `int64` or `string`."""
    files: tuple[BucketFile, ...]
    protection: Protection
    access: KeyAccess
    tombstones: bool = False
    """Whether the table can have tombstones."""

    @property
    def rows(self) -> int:
        """Number of rows in all buckets."""
        return sum(file.rows for file in self.files)

    def read(self, bucket: int, columns: Sequence[str]) -> pl.DataFrame:
        """Read the rows of a bucket: join keys, event time, created time, `ingest_seq`, and the given features.

        The result also has `deleted`, never null, if the table can have tombstones.

        Args:
            bucket: number of the bucket.
            columns: feature columns to read.

        Raises:
            ProtectedFileCorrupt: a file was altered, or was not written for this table and bucket.
            AccessDenied, KeyRevoked: the key store refuses a key.
        """
        deleted = [DELETED] if self.tombstones else []
        names = [*self.key_types, EVENT, CREATED, SEQ, *deleted, *columns]
        tables = [select_or_null(table, names) for table in self.tables(bucket, names)]
        if not tables:
            return pl.DataFrame()
        frame = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables, promote_options="permissive")))
        return frame.with_columns(pl.col(name).cast(pl.Boolean).fill_null(False) for name in deleted)

    def tables(self, bucket: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the content of each file of a bucket, by default with all columns. For errors see `read`."""
        for file in self.files:
            if file.bucket == bucket:
                with self.open(file) as opened:
                    yield opened.read(columns)

    def open(self, file: BucketFile, *, whole: bool = True) -> AbstractContextManager[ProtectedFile]:
        """Open a file. `whole`: whether most of it will be read. For errors see `read`."""
        return protected_files(self.access).open(
            f"{self.uri}/{file.path}",
            protection=self.protection,
            place=file_aad(self.uri, file.path),
            size_bytes=file.size_bytes if whole else None,
        )


def file_aad(uri: str, path: str) -> str:
    """Return the AAD of a table's file: table name and path, so that no other file can replace it unnoticed."""
    return f"{uri.rstrip('/').rsplit('/', 1)[-1]}/{path}"


def key_types(schema: pa.Schema, keys: Sequence[str]) -> dict[str, str]:
    """Return how join keys are stored: whole numbers as `int64`, text as `string`.

    Raises:
        SchemaMismatch: a key has another type.
    """
    types = {}
    for key in keys:
        dtype = schema.field(key).type
        if pa.types.is_integer(dtype):
            types[key] = "int64"
        elif pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_dictionary(dtype):
            types[key] = "string"
        else:
            raise SchemaMismatch(f"Join key '{key}' has type {dtype}. Give whole numbers or text.")
    return types


def stored_key_types(table: DeltaTable | None, keys: Sequence[str]) -> dict[str, str]:
    """Return the stored type of each join key that is in the table; empty if there is no table."""
    if table is None:
        return {}
    schema = pa.schema(table.schema().to_arrow())
    return key_types(schema, [key for key in keys if key in schema.names])


def open_table(uri: str) -> DeltaTable | None:
    """Open a feature table; None if nothing was ingested yet."""
    try:
        return DeltaTable(uri)
    except TableNotFoundError:
        return None


def create_table(uri: str, schema: pa.Schema, *, num_buckets: int) -> DeltaTable:
    """Create an empty feature table."""
    Path(uri).mkdir(parents=True, exist_ok=True)
    return DeltaTable.create(
        uri,
        schema=Schema.from_arrow(schema.append(pa.field(BUCKET, pa.int32()))),
        partition_by=[BUCKET],
        # Keep the whole log: training sets pin versions, and batches are looked up in the history.
        configuration={_BUCKETS_KEY: str(num_buckets), "delta.enableExpiredLogCleanup": "false"},
        mode="ignore",
        raise_if_key_not_exists=False,
    )


def evolve_schema(table: DeltaTable, schema: pa.Schema, *, view: str) -> None:
    """Add the columns of a batch that the table lacks, in one table version.

    Raises:
        SchemaMismatch: a column of the batch has another type than in the table. The table does not change.
    """
    known = pa.schema(table.schema().to_arrow())
    new = []
    for column in schema:
        position = known.get_field_index(column.name)
        if position < 0:
            new.append(column)
        elif not same_type(known.field(position).type, column.type):
            raise SchemaMismatch(
                f"Column '{column.name}' of view '{view}' is stored as {known.field(position).type}, the batch has "
                f"{column.type}. Give the new column another name."
            )
    if new:
        table.alter.add_columns(Schema.from_arrow(pa.schema(new)).fields)


def num_buckets(table: DeltaTable) -> int:
    """Return the number of buckets of a table version: that of its last rebucketing, or of the table's creation."""
    number = table.transaction_version(BUCKETS_APP)
    return int(table.metadata().configuration[_BUCKETS_KEY] if number is None else number)


def last_seq(table: DeltaTable) -> int:
    """Return the last `ingest_seq` that a commit used, -1 for an empty table."""
    version = table.transaction_version(_SEQ_APP)
    return -1 if version is None else int(version)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where and how workers write the files of a batch, as plain data."""

    uri: str
    keys: tuple[str, ...]
    """Join keys."""
    buckets: int
    """Number of buckets."""
    protection: Protection
    access: KeyAccess


def write_files(rows: pa.Table, target: Target, *, name: str) -> list[BucketFile]:
    """Write rows to their buckets, one file for each bucket, sorted by availability."""
    return [
        write_bucket(part, rows.schema, target, bucket=bucket, name=name)
        for bucket, part in split_by_bucket(rows, target.keys, num_buckets=target.buckets)
    ]


def write_bucket(
    rows: pl.DataFrame, schema: pa.Schema, target: Target, *, bucket: int, name: str
) -> BucketFile:
    """Write rows of one bucket as one file, sorted by availability."""
    return write_file(rows.sort(AVAILABLE, EVENT, CREATED, SEQ), schema, target, bucket=bucket, name=name)


def write_file(
    rows: pl.DataFrame, schema: pa.Schema, target: Target, *, bucket: int, name: str
) -> BucketFile:
    """Write rows of one bucket as one file, in their order. Only a sorted file may be added to the table."""
    path = f"{BUCKET}={bucket}/{name}.parquet"
    size = protected_files(target.access).write(
        rows.to_arrow().cast(schema),
        f"{target.uri}/{path}",
        target.protection,
        place=file_aad(target.uri, path),
    )
    return BucketFile(path=path, bucket=bucket, rows=rows.height, size_bytes=size)


def commit(
    table: DeltaTable,
    schema: pa.Schema,
    files: Sequence[BucketFile],
    batch: Batch,
    *,
    seq: int,
    positions: Mapping[str, int] | None = None,
) -> int:
    """Add files to a table in one transaction and return the new table version.

    Args:
        table: the version from which the sequence numbers were taken.
        schema: schema of the rows.
        files: files that workers have written.
        batch: what the commit records about the batch.
        seq: the last `ingest_seq` in the files.
        positions: positions of a stream by application id. They identify a stream's batch; without them the batch is
            identified by its `ingest_id`.

    Raises:
        CommitConflict: another ingestion committed at the same time. The same call can be repeated safely.
    """
    actions: list[AddAction | RemoveAction] = [add_action(file, new_rows=True) for file in files]
    identity = {_BATCH_APP + batch.ingest_id: 1} if positions is None else positions
    properties = CommitProperties(
        custom_metadata={_BATCH_KEY: json.dumps(asdict(batch))},
        max_commit_retries=0,
        app_transactions=[
            Transaction(_SEQ_APP, seq),
            *(Transaction(name, number) for name, number in identity.items()),
        ],
    )
    full_schema = Schema.from_arrow(schema.append(pa.field(BUCKET, pa.int32())))
    try:
        table.create_write_transaction(
            actions, mode="append", schema=full_schema, partition_by=[BUCKET], commit_properties=properties
        )
    except CommitFailedError as error:
        raise CommitConflict(
            f"Another job committed to {table.table_uri} at the same time. Nothing of this batch was stored. "
            "Run it again."
        ) from error
    return int(DeltaTable(table.table_uri).version())


def add_action(file: BucketFile, *, new_rows: bool) -> AddAction:
    """Return the log entry that adds a file. It has no minima and maxima, which would reveal protected values."""
    stats = json.dumps({"numRecords": file.rows})
    now = int(time.time() * 1000)
    return AddAction(file.path, file.size_bytes, {BUCKET: str(file.bucket)}, now, new_rows, stats)


def find_committed_batch(table: DeltaTable, ingest_id: str) -> tuple[Batch, int] | None:
    """Return a committed batch and the table version that added it; None if it was not committed."""
    if table.transaction_version(_BATCH_APP + ingest_id) is None:
        return None
    return find_batch(table, ingest_id)


def find_batch(table: DeltaTable, ingest_id: str) -> tuple[Batch, int] | None:
    """Find a batch in the table's history, newest first, and return it with the table version that added it."""
    for entry in table.history():
        if _BATCH_KEY in entry:
            batch = Batch(**known_fields(Batch, json.loads(entry[_BATCH_KEY])))
            if batch.ingest_id == ingest_id:
                return batch, int(entry["version"])
    return None


def batch_sequence(uri: str, ingest_id: str) -> range | None:
    """Return the `ingest_seq` of all rows of a batch in source order, including quarantined rows; None if unknown."""
    found = find_batch(DeltaTable(uri), ingest_id)
    if found is None:
        return None
    batch, version = found
    last = last_seq(DeltaTable(uri, version=version))
    return range(last - batch.rows_in + 1, last + 1)


def snapshot(
    uri: str,
    *,
    view: str,
    keys: Sequence[str],
    protection: Protection,
    access: KeyAccess,
    version: int | None = None,
) -> Snapshot:
    """Return a version of a feature table, by default the newest.

    Args:
        uri: URI of the table.
        view: name of the view, for error messages.
        keys: join keys.
        protection: the protection that the files must have.
        access: the keys to read with.
        version: table version, None for the newest.

    Raises:
        TrainingSetError: the view has no table yet, or the table has no such version.
    """
    table = open_table(uri)
    if table is None:
        raise TrainingSetError(
            f"View '{view}' has no rows yet. Run `python -m feature_jobs.ingest view={view}`."
        )
    newest = int(table.version())
    if version is not None:
        try:
            table.load_as_version(version)
        except (DeltaError, OverflowError) as error:
            raise TrainingSetError(
                f"View '{view}' has no table version {version}; the newest is {newest}."
            ) from error
    schema = pa.schema(table.schema().to_arrow())
    return Snapshot(
        uri=uri,
        version=int(table.version()),
        num_buckets=num_buckets(table),
        key_types=key_types(schema, keys),
        files=files_of(table),
        protection=protection,
        access=access,
        tombstones=DELETED in schema.names,
    )


def files_of(table: DeltaTable) -> tuple[BucketFile, ...]:
    """Return the files of a table version, in order of their paths."""
    # Not `pa.table`, and no time columns: for either of them Arrow would import pandas.
    actions = pa.RecordBatchReader.from_stream(table.get_add_actions(flatten=True)).read_all()
    columns = actions.select(["path", f"partition.{BUCKET}", "num_records", "size_bytes"])
    return tuple(
        BucketFile(
            path=row["path"],
            bucket=int(row[f"partition.{BUCKET}"]),
            rows=int(row["num_records"]),
            size_bytes=int(row["size_bytes"]),
        )
        for row in sorted(columns.to_pylist(), key=lambda row: str(row["path"]))
    )
