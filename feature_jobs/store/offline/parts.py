"""Part files: rows on the way to their buckets. They let a job sort more rows into buckets than fit into memory.

A job reads its rows piece by piece, and writes the rows of each piece as one unsorted part file per bucket. Later it
merges the parts of each bucket into one sorted file. So it needs memory for one piece, and then for one bucket. Parts
are protected like the table's own files, and are in the same folders, but no table version refers to them. A job
removes its parts at the end. The parts of a killed job are removed by a later job.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa

from cluster.security.encryption.access import protected_files
from cluster.storage import file_system
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.buckets import split_by_bucket
from feature_jobs.store.offline.tables import BucketFile, Target, file_aad
from feature_jobs.store.types.schema import BUCKET

MAX_AGE = dt.timedelta(days=1)
"""A younger part may belong to a running job, so it is not removed."""
_PREFIX = "part-"


@contextmanager
def part_names(uri: str) -> Iterator[str]:
    """Yield a prefix for the names of a job's parts, and remove these parts at the end. Old parts are removed first."""
    fs, _ = file_system(uri)
    for path in _find(uri, _PREFIX):
        if dt.datetime.now(dt.UTC) - fs.modified(path) >= MAX_AGE:
            fs.rm_file(path)
    name = f"{_PREFIX}{uuid.uuid4().hex}"
    try:
        yield name
    finally:
        for path in _find(uri, name):
            fs.rm_file(path)


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


def _find(uri: str, prefix: str) -> list[str]:
    fs, root = file_system(uri)
    paths: list[str] = fs.glob(f"{root}/{BUCKET}=*/{prefix}*.parquet")
    return paths
