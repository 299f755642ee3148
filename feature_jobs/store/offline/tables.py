"""Feature tables: Delta tables in a fixed number of entity-hash buckets, each file sorted by availability.

Workers write the Parquet files, the driver commits them in one Delta transaction. The commit carries the batch's id and
the last `ingest_seq` given out as application transactions: a batch can never be committed twice, and two ingestions at
once cannot give out the same sequence numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from cluster.errors import CommitConflict, SchemaMismatch, TrainingSetError
from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess
from feature_jobs.store.offline.buckets import bucket_of
from feature_jobs.store.offline.point_in_time import AVAILABLE
from feature_jobs.store.types.schema import CREATED, DELETED, EVENT, SEQ

BUCKET, INGESTED = "bucket", "ingested_at"
TIMESTAMP = pa.timestamp("us", "UTC")
_SEQ_APP, _BATCH_APP = "falaj.seq", "falaj.batch."
_BUCKETS_KEY, _BATCH_KEY = "falaj.buckets", "falaj.batch"


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
    """What a commit says of the batch it holds."""

    ingest_id: str
    rows_in: int
    rows_stored: int
    rows_quarantined: int
    reasons: dict[str, int]
    quarantine: str | None
    profile: dict[str, Any] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    """Of the source."""
    rows_late: int = 0
    """Stored, although further behind their stream than it allows for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One version of a feature table, as plain data that any worker can read from."""

    uri: str
    version: int
    num_buckets: int
    key_types: dict[str, str]
    """Join key to `int64` or `string`."""
    files: tuple[BucketFile, ...]
    protection: Protection
    access: KeyAccess
    tombstones: bool = False
    """Whether the table can hold any."""

    @property
    def rows(self) -> int:
        """Rows in all buckets."""
        return sum(file.rows for file in self.files)

    def is_ordered(self, bucket: int) -> bool:
        """Whether a bucket's rows lie in one file, and so come in order of (available, event, created, seq)."""
        return sum(file.bucket == bucket for file in self.files) <= 1

    def read(self, bucket: int, columns: Sequence[str], *, sequence: bool = True) -> pl.DataFrame:
        """A bucket's rows: join keys, the three columns that order them, and the given features; with `deleted`, never
        null, where the table can hold tombstones.

        Args:
            bucket: which.
            columns: features.
            sequence: with `ingest_seq`; who needs no more than the order the rows come in does without.

        Raises:
            ProtectedFileCorrupt: a file was altered, or is not the one that was written for this table and bucket.
            AccessDenied, KeyRevoked: as the key store says.
        """
        ends = [DELETED] if self.tombstones else []
        wanted = [*self.key_types, EVENT, CREATED, *([SEQ] if sequence else []), *ends, *columns]
        tables = [with_columns(table, wanted) for table in self.tables(bucket, wanted)]
        if not tables:
            return pl.DataFrame()
        frame = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables, promote_options="permissive")))
        return frame.with_columns(pl.col(name).cast(pl.Boolean).fill_null(False) for name in ends)

    def tables(self, bucket: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """A bucket's files as they are, whole or some of their columns; raises as `read`."""
        reader = protected_files(self.access)
        for file in self.files:
            if file.bucket == bucket:
                yield reader.read(
                    f"{self.uri}/{file.path}",
                    columns,
                    protection=self.protection,
                    place=place_of(self.uri, file.path),
                )


def place_of(uri: str, path: str) -> str:
    """Where a file says it belongs: table and path, so that it cannot stand in for another one."""
    return f"{uri.rstrip('/').rsplit('/', 1)[-1]}/{path}"


def key_types(schema: pa.Schema, keys: Sequence[str]) -> dict[str, str]:
    """How join keys are stored: whole numbers as int64, text as string.

    Raises:
        SchemaMismatch: a key of another type.
    """
    types = {}
    for key in keys:
        given = schema.field(key).type
        if pa.types.is_integer(given):
            types[key] = "int64"
        elif pa.types.is_string(given) or pa.types.is_large_string(given) or pa.types.is_dictionary(given):
            types[key] = "string"
        else:
            raise SchemaMismatch(f"Join key '{key}' has type {given}; give whole numbers or text.")
    return types


def stored_key_types(table: DeltaTable | None, keys: Sequence[str]) -> dict[str, str]:
    """How a table stores those of the keys that it has; nothing where there is no table."""
    if table is None:
        return {}
    schema = pa.schema(table.schema().to_arrow())
    return key_types(schema, [key for key in keys if key in schema.names])


def open_table(uri: str) -> DeltaTable | None:
    """A feature table, none where nothing was ingested yet."""
    try:
        return DeltaTable(uri)
    except TableNotFoundError:
        return None


def create_table(uri: str, schema: pa.Schema, *, num_buckets: int) -> DeltaTable:
    """Make an empty feature table."""
    Path(uri).mkdir(parents=True, exist_ok=True)
    return DeltaTable.create(
        uri,
        schema=Schema.from_arrow(schema.append(pa.field(BUCKET, pa.int32()))),
        partition_by=[BUCKET],
        # The log stays whole: training sets pin versions, and batches are found in its history.
        configuration={_BUCKETS_KEY: str(num_buckets), "delta.enableExpiredLogCleanup": "false"},
        mode="ignore",
        raise_if_key_not_exists=False,
    )


def check_schema(table: DeltaTable, schema: pa.Schema, *, view: str) -> None:
    """Refuse a batch whose columns changed their type; new columns are added to the table, in one version of it.

    Raises:
        SchemaMismatch: naming the column and both types.
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
    """The number of buckets the table was made with."""
    return int(table.metadata().configuration[_BUCKETS_KEY])


def last_seq(table: DeltaTable) -> int:
    """The last `ingest_seq` given out, -1 in an empty table."""
    version = table.transaction_version(_SEQ_APP)
    return -1 if version is None else int(version)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where and how workers write a batch's files, as plain data."""

    uri: str
    keys: tuple[str, ...]
    """Join keys."""
    buckets: int
    protection: Protection
    access: KeyAccess


def write_files(rows: pa.Table, target: Target, *, name: str) -> list[BucketFile]:
    """Write rows to their buckets, one file each, sorted by availability."""
    frame = pl.DataFrame(pl.from_arrow(rows)).with_columns(
        pl.Series(BUCKET, bucket_of(rows, target.keys, num_buckets=target.buckets))
    )
    return [
        write_bucket(part.drop(BUCKET), rows.schema, target, bucket=int(part[BUCKET][0]), name=name)
        for part in frame.partition_by(BUCKET, maintain_order=True)
    ]


def write_bucket(
    rows: pl.DataFrame, schema: pa.Schema, target: Target, *, bucket: int, name: str
) -> BucketFile:
    """Write rows of one bucket as one file, sorted by availability."""
    path = f"{BUCKET}={bucket}/{name}.parquet"
    content = rows.sort(AVAILABLE, EVENT, CREATED, SEQ).to_arrow().cast(schema)
    size = protected_files(target.access).write(
        content, f"{target.uri}/{path}", target.protection, place=place_of(target.uri, path)
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
    """Add files in one transaction; gives the new table version.

    Args:
        table: as it was when the sequence numbers were given out.
        schema: of the rows.
        files: what workers wrote.
        batch: what the commit says of itself.
        seq: the last `ingest_seq` in the files.
        positions: of a stream, how far it has come, by application id; they tell its batches from one another, where
            a batch of its own has its id for that.

    Raises:
        CommitConflict: another ingestion committed meanwhile; running this one again is safe.
    """
    actions: list[AddAction | RemoveAction] = [added(file, new_rows=True) for file in files]
    told_apart_by = {_BATCH_APP + batch.ingest_id: 1} if positions is None else positions
    properties = CommitProperties(
        custom_metadata={_BATCH_KEY: json.dumps(asdict(batch))},
        max_commit_retries=0,
        app_transactions=[
            Transaction(_SEQ_APP, seq),
            *(Transaction(name, number) for name, number in told_apart_by.items()),
        ],
    )
    full = Schema.from_arrow(schema.append(pa.field(BUCKET, pa.int32())))
    try:
        table.create_write_transaction(
            actions, mode="append", schema=full, partition_by=[BUCKET], commit_properties=properties
        )
    except CommitFailedError as error:
        raise CommitConflict(
            f"Another job committed to {table.table_uri} meanwhile; nothing of this batch was stored. "
            "Run it again."
        ) from error
    return int(DeltaTable(table.table_uri).version())


def added(file: BucketFile, *, new_rows: bool) -> AddAction:
    """What the log says of a file; without minima and maxima, which would show what is protected."""
    stats = json.dumps({"numRecords": file.rows})
    now = int(time.time() * 1000)
    return AddAction(file.path, file.size_bytes, {BUCKET: str(file.bucket)}, now, new_rows, stats)


def committed(table: DeltaTable, ingest_id: str) -> tuple[Batch, int] | None:
    """A batch that is in the table already, with the version that added it."""
    if table.transaction_version(_BATCH_APP + ingest_id) is None:
        return None
    return find_batch(table, ingest_id)


def find_batch(table: DeltaTable, ingest_id: str) -> tuple[Batch, int] | None:
    """A batch by what the table's history says of it, the newest first."""
    for entry in table.history():
        if _BATCH_KEY in entry:
            batch = Batch(**json.loads(entry[_BATCH_KEY]))
            if batch.ingest_id == ingest_id:
                return batch, int(entry["version"])
    return None


def sequence_of(uri: str, ingest_id: str) -> range | None:
    """The `ingest_seq` of a batch's rows in the order of their source, those that went to quarantine included."""
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
    """A version of a feature table, by default the newest.

    Args:
        uri: of the table.
        view: its name, for messages.
        keys: join keys.
        protection: what its files must be under.
        access: whose keys to read with.
        version: of the table.

    Raises:
        TrainingSetError: nothing was ingested into the view yet, or there is no such version.
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
        files=_files_of(table),
        protection=protection,
        access=access,
        tombstones=DELETED in schema.names,
    )


def _files_of(table: DeltaTable) -> tuple[BucketFile, ...]:
    # Neither as `pa.table`, nor with the times among the columns: for both, Arrow would import pandas.
    said = pa.RecordBatchReader.from_stream(table.get_add_actions(flatten=True)).read_all()
    named = said.select(["path", f"partition.{BUCKET}", "num_records", "size_bytes"])
    actions: list[dict[str, Any]] = named.to_pylist()
    return tuple(
        BucketFile(
            path=action["path"],
            bucket=int(action[f"partition.{BUCKET}"]),
            rows=int(action["num_records"]),
            size_bytes=int(action["size_bytes"]),
        )
        for action in sorted(actions, key=lambda action: str(action["path"]))
    )


def with_columns(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The columns in order; one that an older file lacks is null."""
    there = set(table.column_names)
    if there.issuperset(names):
        return table.select(list(names))
    nothing = pa.nulls(table.num_rows)
    return pa.table([table[name] if name in there else nothing for name in names], names=list(names))


def same_type(known: pa.DataType, given: pa.DataType) -> bool:
    """Whether a column of a table can take values of a type; text may be in one encoding or another."""
    names = {str(known), str(given)}
    return known == given or names <= {"string", "large_string", "string_view"}
