"""Rewrite the files of a feature table: merge many small files into few large ones, or encrypt rows with newer keys.

The rows do not change, so every join gives the same result as before. The old files stay, so older table versions stay
readable. Delta's own compaction is not used because it cannot write encrypted files.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from cluster.errors import Inconsistent, SourceError
from cluster.known_fields import known_fields
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.tables import BucketFile, Snapshot, Target
from feature_jobs.store.types.schema import BUCKET

MAX_COMMITS = 10
"""How often a commit is tried while other writers commit to the same table."""
_KEY = "falaj.rewrite"


def fragmented_buckets(pinned: Snapshot) -> list[int]:
    """Return the buckets that have more than one file."""
    counts = Counter(file.bucket for file in pinned.files)
    return sorted(bucket for bucket, count in counts.items() if count > 1)


def rewrite(pinned: Snapshot, target: Target, buckets: Iterable[int]) -> tuple[int, int]:
    """Write the rows of each bucket as one new file, then replace the old files in one transaction.

    If the process is killed before the transaction, the new files stay on disk and nothing refers to them.

    Args:
        pinned: the newest version of the table, with its current protection.
        target: how to write the new files.
        buckets: the buckets to rewrite. The largest bucket decides how much memory is needed.

    Returns:
        The new table version and the number of replaced files.

    Raises:
        SourceError: another job replaced the same files, or other writers committed too often.
        Inconsistent: the new files would have another number of rows. Nothing was committed.
    """
    chosen = set(buckets)
    old = [file for file in pinned.files if file.bucket in chosen]
    name = f"rewritten-{uuid.uuid4().hex}"
    new = [_merged(pinned, target, bucket, name) for bucket in sorted(chosen)]
    if sum(file.rows for file in old) != sum(file.rows for file in new):
        raise Inconsistent(
            f"{pinned.uri}: the rewritten files have another number of rows than the old ones. Nothing was committed."
        )
    return replace_files(pinned, old, new, metadata=Rewrite(len(old)).metadata), len(old)


class Rewrite(NamedTuple):
    """A past rewrite of a table, as its commit records it."""

    files: int
    """Number of replaced files."""
    buckets: int | None = None
    """The new number of buckets; None if it stayed the same."""

    @property
    def metadata(self) -> dict[str, str]:
        """The custom metadata of the commit."""
        return {
            _KEY: json.dumps({name: value for name, value in self._asdict().items() if value is not None})
        }


def past_rewrites(table: DeltaTable) -> dict[int, Rewrite]:
    """Return every rewrite in the table's history by table version."""
    return {
        int(entry["version"]): Rewrite(**known_fields(Rewrite, json.loads(entry[_KEY])))
        for entry in table.history()
        if _KEY in entry
    }


def _merged(pinned: Snapshot, target: Target, bucket: int, name: str) -> BucketFile:
    return write_merged(pinned.tables(bucket), target, bucket=bucket, name=name)


def write_merged(tables: Iterable[pa.Table], target: Target, *, bucket: int, name: str) -> BucketFile:
    """Write the rows of some files of one bucket as one file. A column that a file lacks is null."""
    rows = pa.concat_tables(tables, promote_options="permissive")
    frame = pl.DataFrame(pl.from_arrow(rows))
    return offline.write_bucket(frame, rows.schema, target, bucket=bucket, name=name)


def replace_files(
    pinned: Snapshot, old: Sequence[BucketFile], new: Sequence[BucketFile], *, metadata: Mapping[str, str]
) -> int:
    """Replace files of a table in one transaction and return the new table version.

    A concurrent ingestion only adds files. After such a commit the replacement is tried again on the newer version.

    Args:
        pinned: the version for which the new files were made.
        old: files of this version, which are removed from the table.
        new: files that workers have written, which are added.
        metadata: custom metadata of the commit.

    Raises:
        SourceError: another job replaced the same files or rebucketed the table, or other writers committed too
            often.
    """
    for _ in range(MAX_COMMITS):
        table = DeltaTable(pinned.uri)
        present = {file.path for file in offline.files_of(table)}
        is_rebucketed = offline.num_buckets(table) != pinned.num_buckets
        if is_rebucketed or not present.issuperset(file.path for file in old):
            raise SourceError(
                f"Another job rewrote files of {pinned.uri} at the same time. Nothing was changed. Run it again."
            )
        try:
            commit_replacement(table, old, new, metadata=metadata)
        except CommitFailedError:
            continue
        return int(DeltaTable(pinned.uri).version())
    raise SourceError(
        f"Other jobs committed to {pinned.uri} {MAX_COMMITS} times in a row. Nothing was changed. Run it again."
    )


def commit_replacement(
    table: DeltaTable,
    old: Sequence[BucketFile],
    new: Sequence[BucketFile],
    *,
    metadata: Mapping[str, str],
    transactions: Sequence[Transaction] = (),
) -> None:
    """Replace files in one transaction, if this is still the table's newest version.

    Raises:
        CommitFailedError: another job has committed in the meantime.
    """
    now = int(time.time() * 1000)
    removals: list[AddAction | RemoveAction] = [
        RemoveAction(file.path, False, now, file.size_bytes, {BUCKET: str(file.bucket)}) for file in old
    ]
    table.create_write_transaction(
        [*removals, *(offline.add_action(file, new_rows=False) for file in new)],
        mode="append",
        schema=Schema.from_arrow(pa.schema(table.schema().to_arrow())),
        partition_by=[BUCKET],
        commit_properties=CommitProperties(
            custom_metadata=dict(metadata), max_commit_retries=0, app_transactions=list(transactions)
        ),
    )


def current_target(pinned: Snapshot) -> Target:
    """Return the target that writes files with the table's current keys and protection."""
    return Target(
        uri=pinned.uri,
        keys=tuple(pinned.key_types),
        buckets=pinned.num_buckets,
        protection=pinned.protection,
        access=pinned.access,
    )
