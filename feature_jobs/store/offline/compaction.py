"""Rewriting a feature table's files: few large ones in place of many small ones, or the same rows under newer keys.

Rows stay as they are, so every join gives what it gave before; versions of before stay readable, because their files
stay. Delta's own compaction cannot write encrypted files.
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
from feature_jobs.store.offline.tables import BUCKET, BucketFile, Snapshot, Target

MAX_COMMITS = 10
_KEY = "falaj.rewrite"


def fragmented(pinned: Snapshot) -> list[int]:
    """The buckets with more than one file."""
    counts = Counter(file.bucket for file in pinned.files)
    return sorted(bucket for bucket, count in counts.items() if count > 1)


def rewrite(pinned: Snapshot, target: Target, buckets: Iterable[int]) -> tuple[int, int]:
    """Write each bucket's rows as one new file, then change over in one transaction.

    Killed before that, it leaves files that nothing refers to.

    Args:
        pinned: the table's newest version, with the protection it has.
        target: how the new files are written.
        buckets: which to rewrite; memory is bounded by the largest.

    Returns:
        The new table version, and how many files were replaced.

    Raises:
        SourceError: another job rewrote the same files meanwhile, or writers gave it no chance.
        Inconsistent: the new files would not have the old ones' rows; nothing was committed.
    """
    chosen = set(buckets)
    old = [file for file in pinned.files if file.bucket in chosen]
    name = f"rewritten-{uuid.uuid4().hex}"
    new = [_merged(pinned, target, bucket, name) for bucket in sorted(chosen)]
    if sum(file.rows for file in old) != sum(file.rows for file in new):
        raise Inconsistent(
            f"{pinned.uri}: rewritten files have other rows than before. Nothing was committed."
        )
    said = {_KEY: json.dumps({"files": len(old)})}
    return change_over(pinned.uri, old, new, said=said), len(old)


def rewrites(table: DeltaTable) -> dict[int, int]:
    """Table version to replaced files, of every rewrite that the table's history knows."""
    return {
        int(entry["version"]): int(json.loads(entry[_KEY])["files"])
        for entry in table.history()
        if _KEY in entry
    }


def _merged(pinned: Snapshot, target: Target, bucket: int, name: str) -> BucketFile:
    whole = pa.concat_tables(pinned.tables(bucket), promote_options="permissive")
    return offline.write_bucket(
        pl.DataFrame(pl.from_arrow(whole)), whole.schema, target, bucket=bucket, name=name
    )


def change_over(
    uri: str, old: Sequence[BucketFile], new: Sequence[BucketFile], *, said: Mapping[str, str]
) -> int:
    """Put new files in the place of old ones in one transaction; gives the new table version.

    An ingestion that came in between only added files, so the same change is tried on top of it.

    Args:
        uri: of the table.
        old: files of its newest version.
        new: what workers wrote.
        said: what the commit says of itself.

    Raises:
        SourceError: another job rewrote the same files meanwhile, or writers gave it no chance.
    """
    now = int(time.time() * 1000)
    gone: list[AddAction | RemoveAction] = [
        RemoveAction(file.path, False, now, file.size_bytes, {BUCKET: str(file.bucket)}) for file in old
    ]
    actions = [*gone, *(offline.added(file, new_rows=False) for file in new)]
    properties = CommitProperties(custom_metadata=dict(said), max_commit_retries=0)
    for _ in range(MAX_COMMITS):
        table = DeltaTable(uri)
        present = set(pa.table(table.get_add_actions())["path"].to_pylist())
        if not present.issuperset(file.path for file in old):
            raise SourceError(
                f"Another job rewrote files of {uri} meanwhile; nothing was changed. Run it again."
            )
        schema = Schema.from_arrow(pa.schema(table.schema().to_arrow()))
        try:
            table.create_write_transaction(
                actions, mode="append", schema=schema, partition_by=[BUCKET], commit_properties=properties
            )
        except CommitFailedError:
            continue
        return int(DeltaTable(uri).version())
    raise SourceError(f"{uri} is written to all the time; nothing was changed. Run it again.")


def as_target(pinned: Snapshot) -> Target:
    """How files of the table are written now."""
    return Target(
        uri=pinned.uri,
        keys=tuple(pinned.key_types),
        buckets=pinned.num_buckets,
        protection=pinned.protection,
        access=pinned.access,
    )
