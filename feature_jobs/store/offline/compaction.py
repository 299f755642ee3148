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

import polars as pl
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from cluster.errors import Inconsistent, SourceError
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
    metadata = {_KEY: json.dumps({"files": len(old)})}
    return replace_files(pinned.uri, old, new, metadata=metadata), len(old)


def past_rewrites(table: DeltaTable) -> dict[int, int]:
    """Return the number of replaced files by table version, for every rewrite in the table's history."""
    return {
        int(entry["version"]): int(json.loads(entry[_KEY])["files"])
        for entry in table.history()
        if _KEY in entry
    }


def _merged(pinned: Snapshot, target: Target, bucket: int, name: str) -> BucketFile:
    rows = pa.concat_tables(pinned.tables(bucket), promote_options="permissive")
    return offline.write_bucket(
        pl.DataFrame(pl.from_arrow(rows)), rows.schema, target, bucket=bucket, name=name
    )


def replace_files(
    uri: str, old: Sequence[BucketFile], new: Sequence[BucketFile], *, metadata: Mapping[str, str]
) -> int:
    """Replace files of a table in one transaction and return the new table version.

    A concurrent ingestion only adds files. After such a commit the replacement is tried again on the newer version.

    Args:
        uri: URI of the table.
        old: files of the newest version, which are removed from it.
        new: files that workers have written, which are added.
        metadata: custom metadata of the commit.

    Raises:
        SourceError: another job replaced the same files, or other writers committed too often.
    """
    now = int(time.time() * 1000)
    removals: list[AddAction | RemoveAction] = [
        RemoveAction(file.path, False, now, file.size_bytes, {BUCKET: str(file.bucket)}) for file in old
    ]
    actions = [*removals, *(offline.add_action(file, new_rows=False) for file in new)]
    properties = CommitProperties(custom_metadata=dict(metadata), max_commit_retries=0)
    for _ in range(MAX_COMMITS):
        table = DeltaTable(uri)
        present = set(pa.table(table.get_add_actions())["path"].to_pylist())
        if not present.issuperset(file.path for file in old):
            raise SourceError(
                f"Another job rewrote files of {uri} at the same time. Nothing was changed. Run it again."
            )
        schema = Schema.from_arrow(pa.schema(table.schema().to_arrow()))
        try:
            table.create_write_transaction(
                actions, mode="append", schema=schema, partition_by=[BUCKET], commit_properties=properties
            )
        except CommitFailedError:
            continue
        return int(DeltaTable(uri).version())
    raise SourceError(
        f"Other jobs committed to {uri} {MAX_COMMITS} times in a row. Nothing was changed. Run it again."
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
