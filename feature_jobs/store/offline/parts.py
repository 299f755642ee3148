"""Part files: with them, a job can sort more rows into buckets than fit into memory.

A job reads its rows piece by piece, and writes the rows of each piece as one unsorted part file per bucket. Later it
merges the parts of each bucket into one sorted file. So it needs memory for one piece, and then for one bucket. Parts
are protected like the table's own files, and are in the same folders, but no table version refers to them.

A job removes its parts at the end. After a day, the table's next large ingestion or rebucketing removes the parts of a
killed job. So a job must not need a part for longer than a day.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa

from cluster.security.encryption.access import protected_files
from cluster.storage import file_system, list_files, read_bytes, remove
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.buckets import split_by_bucket
from feature_jobs.store.offline.tables import BucketFile, Target, file_aad
from feature_jobs.store.types.schema import BUCKET

MAX_AGE = dt.timedelta(days=1)
"""A younger file that no table version refers to may belong to a running job, so it is not touched."""
_PREFIX = "part-"


@contextmanager
def part_names(uri: str) -> Iterator[str]:
    """Yield a prefix for the names of a job's parts, and remove these parts at the end. Old parts are removed first."""
    _remove_old(uri)
    name = f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        yield name
    finally:
        for path in bucket_files(uri, name):
            remove(f"{uri}/{path}")


def write_parts(rows: pa.Table, target: Target, *, name: str) -> list[BucketFile]:
    """Write rows as one part per bucket, in their order."""
    return [
        offline.write_file(part, rows.schema, target, bucket=bucket, name=name)
        for bucket, part in split_by_bucket(rows, target.keys, num_buckets=target.buckets)
    ]


def read_parts(paths: Sequence[str], target: Target) -> Iterator[pa.Table]:
    """Yield the rows of parts."""
    files = protected_files(target.access)
    for path in paths:
        yield files.read(
            f"{target.uri}/{path}", protection=target.protection, place=file_aad(target.uri, path)
        )


def _remove_old(uri: str) -> None:
    for path in bucket_files(uri, _PREFIX):
        if not may_be_in_use(f"{uri}/{path}"):
            remove(f"{uri}/{path}")


def bucket_files(uri: str, prefix: str = "") -> list[str]:
    """Return all Parquet files whose names begin with a prefix, as paths relative to the table, sorted.

    Files are found in every folder of a bucket, because the table may have had more buckets before. The root is taken
    as it is: a character such as `[` in its path is no pattern.
    """
    fs, root = file_system(uri)
    try:
        folders = [str(path).rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False)]
    except FileNotFoundError:
        return []
    files = (
        f"{folder}/{name}"
        for folder in folders
        if folder.startswith(f"{BUCKET}=")
        for path in list_files(f"{uri}/{folder}", ".parquet")
        if (name := path.rpartition("/")[2]).startswith(prefix)
    )
    return sorted(files)


def may_be_in_use(uri: str) -> bool:
    """Return whether a file that no table version refers to may belong to a running job, or was just removed by it."""
    written = modified_at(uri)
    return written is None or dt.datetime.now(dt.UTC) - written < MAX_AGE


def modified_at(uri: str) -> dt.datetime | None:
    """Return when a file was written; None if another job has removed it."""
    fs, path = file_system(uri)
    try:
        modified: dt.datetime = fs.modified(path)
    except FileNotFoundError:
        return None
    return modified


def ever_added(uri: str) -> set[str]:
    """Return the files of all versions, from the log itself, because Delta forgets removed files after a time."""
    actions = [
        json.loads(line)
        for name in list_files(f"{uri}/_delta_log", ".json")
        for line in read_bytes(name).splitlines()
    ]
    return {action["add"]["path"] for action in actions if "add" in action}


@contextmanager
def removed_after(uri: str, prefix: str, *errors: type[BaseException]) -> Iterator[None]:
    """Remove the files whose names begin with a prefix if the block ends with one of some errors.

    Files that a version of the table refers to stay.
    """
    try:
        yield
    except errors:
        used = ever_added(uri)
        for path in bucket_files(uri, prefix):
            if path not in used:
                remove(f"{uri}/{path}")
        raise
