"""Rebucket a table: distribute its rows over another number of buckets.

All files are written again, and one transaction replaces the old files and the number of buckets. So a reader sees
either the old layout or the new one, and a job that is killed before the transaction changes nothing. The old files
stay, and each older table version still has its own number of buckets, so training sets that pin it can be built again.

The rows go through part files (`parts.py`), so the job needs memory for one row group, and then for one new bucket,
however large the old buckets are. If other jobs add files in the meantime, only these files are distributed in another
round. If nothing is committed, the new files are removed. Rows keep their `ingest_seq` and all other values.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
from deltalake import DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError

from cluster.errors import Inconsistent, SourceError
from cluster.security.encryption.access import protected_files
from feature_jobs.store.offline.buckets import BUCKET_VALUES
from feature_jobs.store.offline.compaction import (
    MAX_COMMITS,
    Rewrite,
    commit_replacement,
    current_target,
    write_merged,
)
from feature_jobs.store.offline.parts import part_names, read_parts, removed_after, write_parts
from feature_jobs.store.offline.tables import BUCKETS_APP, BucketFile, Snapshot, Target, file_aad
from feature_jobs.store.types.grouping import consecutive_groups

RunAll = Callable[[Callable[..., Any], Iterable[Sequence[Any]]], Iterable[Any]]
"""Runs a function once for each list of arguments, in this process or in tasks, and returns the results in order."""


class Rebucketed(NamedTuple):
    """The result of a rebucketing."""

    version: int
    """The new table version."""
    files: int
    """Number of replaced files."""


def rebucket(
    newest: Callable[[], Snapshot], num_buckets: int, *, num_columns: int, run_all: RunAll
) -> Rebucketed:
    """Distribute the rows of a table over another number of buckets.

    Args:
        newest: returns the newest version of the table, with its current protection.
        num_buckets: the new number of buckets.
        num_columns: number of the table's columns.
        run_all: runs the steps.

    Raises:
        SourceError: another job replaced files at the same time, or other writers committed too often.
        Inconsistent: the new files would have another number of rows. Nothing was committed.
    """
    uri, name = newest().uri, f"rebucketed-{uuid.uuid4().hex}"
    with removed_after(uri, name, SourceError, Inconsistent):
        return _rebucket(newest, num_buckets, name, num_columns=num_columns, run_all=run_all)


def _rebucket(
    newest: Callable[[], Snapshot], num_buckets: int, name: str, *, num_columns: int, run_all: RunAll
) -> Rebucketed:
    done: dict[str, BucketFile] = {}
    new: list[BucketFile] = []
    for number in range(MAX_COMMITS):
        pinned = newest()
        present = {file.path: file for file in pinned.files}
        if not present.keys() >= done.keys():
            raise SourceError(
                f"Another job rewrote files of {pinned.uri} at the same time. Nothing was changed. Run it again."
            )
        added = [file for path, file in present.items() if path not in done]
        # A task starts too slowly for the few rows that a stream has added.
        is_small = number > 0 and sum(file.rows for file in added) * num_columns <= BUCKET_VALUES
        round_ = _Round(
            target=replace(current_target(pinned), buckets=num_buckets),
            limit=max(BUCKET_VALUES // num_columns, 1),
            name=f"{name}-{number}",
            run_all=_run_here if is_small else run_all,
        )
        with removed_after(pinned.uri, round_.name, BaseException):
            new += round_.distribute(added)
        done = present
        if sum(file.rows for file in new) != pinned.rows:
            raise Inconsistent(
                f"{pinned.uri}: the new buckets have another number of rows than the old ones. Nothing was committed."
            )
        try:
            commit_replacement(
                DeltaTable(pinned.uri, version=pinned.version),
                list(done.values()),
                new,
                metadata=Rewrite(len(done), num_buckets).metadata,
                transactions=[Transaction(BUCKETS_APP, num_buckets)],
            )
        except CommitFailedError:
            continue
        return Rebucketed(int(DeltaTable(pinned.uri).version()), len(done))
    raise SourceError(
        f"Other jobs committed to {newest().uri} {MAX_COMMITS} times in a row. Nothing was changed. Run it again."
    )


def _run_here(step: Callable[..., Any], calls: Iterable[Sequence[Any]]) -> list[Any]:
    return [step(*arguments) for arguments in calls]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """How some files are distributed over new buckets."""

    target: Target
    limit: int
    """Number of rows that are in memory at the same time."""
    name: str
    """Prefix of the new files."""
    run_all: RunAll

    def distribute(self, files: Sequence[BucketFile]) -> list[BucketFile]:
        """Write the rows of some files as one file per new bucket."""
        with part_names(self.target.uri) as name:
            groups = enumerate(consecutive_groups(files, size=lambda file: file.rows, limit=self.limit))
            calls = ((group, self.target, self.limit, f"{name}-{number}") for number, group in groups)
            by_bucket: dict[int, list[str]] = {}
            for part in itertools.chain.from_iterable(self.run_all(_split, calls)):
                by_bucket.setdefault(part.bucket, []).append(part.path)
            merges = ((paths, self.target, bucket, self.name) for bucket, paths in sorted(by_bucket.items()))
            return list(self.run_all(_merge, merges))


def _split(files: Sequence[BucketFile], target: Target, limit: int, name: str) -> list[BucketFile]:
    """Write the rows of files as part files of their new buckets."""
    parts: list[BucketFile] = []
    pending: list[pa.Table] = []

    def flush() -> None:
        rows = pa.concat_tables(pending, promote_options="permissive")
        parts.extend(write_parts(rows, target, name=f"{name}-{len(parts)}"))
        pending.clear()

    reader = protected_files(target.access)
    for file in files:
        place = file_aad(target.uri, file.path)
        uri = f"{target.uri}/{file.path}"
        with reader.open(uri, protection=target.protection, place=place) as source:
            for number in range(source.num_row_groups):
                pending.append(source.read(row_group=number))
                if sum(table.num_rows for table in pending) >= limit:
                    flush()
    if pending:
        flush()
    return parts


def _merge(paths: Sequence[str], target: Target, bucket: int, name: str) -> BucketFile:
    return write_merged(read_parts(paths, target), target, bucket=bucket, name=name)
