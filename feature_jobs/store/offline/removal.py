"""Removing rows from a feature table for good: from its newest version, and from the disk.

The files that hold such rows are written anew without them in one transaction; then every file that still holds one is
deleted, whichever version it belongs to. Files without such rows stay, so older versions that never held any, and the
training sets that pin them, are as they were. Killed at any point, the same call again finishes the job: what is left
to do is read from the files themselves.

Retention is one use of it; the erasure of a person is another, with another expression.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable
from fsspec.core import url_to_fs

from cluster.ledger import Ledger
from cluster.ledger.events import RowsRemoved, TrainingSetBuilt, TrainingSetNotReproducible
from cluster.security.encryption.access import protected_files
from cluster.storage import list_files, read_bytes
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.compaction import as_target, change_over
from feature_jobs.store.offline.tables import BUCKET, BucketFile, Snapshot, place_of, with_columns

GRACE = timedelta(days=1)
"""A file younger than this that no version knows may be one that is being written."""
_KEY = "falaj.removal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why rows are removed, as events say it."""

    cause: str
    older_than: str | None = None
    """ISO 8601; rows with an event before it, where that is the rule."""


def remove(pinned: Snapshot, where: pl.Expr, reason: Reason, ledger: Ledger, *, view: str, actor: str) -> int:
    """Remove the rows that an expression is true of, in every version; gives how many the newest version had.

    Args:
        pinned: the table's newest version.
        where: over stored columns; null is not true.
        reason: for the events.
        ledger: is told what was removed, and which training sets cannot be built again.
        view: whose table it is.
        actor: who does it.

    Raises:
        SourceError: another job rewrote the same files meanwhile; running this again is safe.
    """
    held = holding(pinned, where)
    removed = _rewrite_without(pinned, where, held, reason)
    _mark(pinned, held, reason, ledger, view=view, actor=actor)
    fs, root = url_to_fs(pinned.uri)
    for path in held:
        fs.rm(f"{root}/{path}")
    # Once more, for a training set that was being built from the version before.
    _mark(pinned, held, reason, ledger, view=view, actor=actor)
    _say(pinned.uri, ledger, view=view, actor=actor)
    return removed


def holding(pinned: Snapshot, where: pl.Expr) -> dict[str, int]:
    """The table's files on disk, of any version or none, that hold such rows, and how many."""
    known = _ever_added(pinned.uri)
    found = {}
    for path in _on_disk(pinned):
        if path not in known and _is_young(f"{pinned.uri}/{path}"):
            continue
        count = int(_read(pinned, path, where.meta.root_names()).select(_true(where).sum()).item())
        if count:
            found[path] = count
    return found


def _rewrite_without(pinned: Snapshot, where: pl.Expr, held: Mapping[str, int], reason: Reason) -> int:
    old = [file for file in pinned.files if file.path in held]
    if not old:
        return 0
    removed = sum(held[file.path] for file in old)
    run = uuid.uuid4().hex
    new = [
        kept
        for number, file in enumerate(old)
        if (kept := file_without(pinned, file, where, name=f"kept-{run}-{number}")) is not None
    ]
    said = asdict(reason) | {
        "rows_before": pinned.rows,
        "rows_after": pinned.rows - removed,
        "files": len(old),
    }
    change_over(pinned.uri, old, new, said={_KEY: json.dumps(said)})
    return removed


def file_without(pinned: Snapshot, file: BucketFile, where: pl.Expr, *, name: str) -> BucketFile | None:
    """A file without some rows, written anew; None where nothing is left."""
    table = protected_files(pinned.access).read(
        f"{pinned.uri}/{file.path}", protection=pinned.protection, place=place_of(pinned.uri, file.path)
    )
    rows = pl.DataFrame(pl.from_arrow(with_columns(table, _all(table.column_names, where))))
    rows = rows.filter(~_true(where)).select(table.column_names)
    if rows.is_empty():
        return None
    return offline.write_bucket(rows, table.schema, as_target(pinned), bucket=file.bucket, name=name)


def _mark(
    pinned: Snapshot, held: Mapping[str, int], reason: Reason, ledger: Ledger, *, view: str, actor: str
) -> None:
    """Say of every training set that pins a version with such rows that it cannot be built again; once."""
    said = {
        entry.payload["training_set"]
        for entry in ledger.entries(TrainingSetNotReproducible)
        if entry.payload["view"] == view
    }
    lost: dict[int, bool] = {}
    for entry in list(ledger.entries(TrainingSetBuilt)):
        version = entry.payload["table_versions"].get(view)
        if version is None or entry.seq in said:
            continue
        if version not in lost:
            lost[version] = not held.keys().isdisjoint(_files_of(pinned.uri, version))
        if lost[version]:
            event = TrainingSetNotReproducible(
                training_set=entry.seq,
                service=entry.payload["service"],
                row_hash=entry.payload["row_hash"],
                view=view,
                table_version=version,
                cause=reason.cause,
            )
            ledger.append(event, actor=actor)


def _say(uri: str, ledger: Ledger, *, view: str, actor: str) -> None:
    """Say what was removed, also what a killed job did not get to say."""
    said = {
        entry.payload["table_version"]
        for entry in ledger.entries(RowsRemoved)
        if entry.payload["view"] == view
    }
    for entry in sorted(DeltaTable(uri).history(), key=lambda entry: int(entry["version"])):
        if _KEY in entry and int(entry["version"]) not in said:
            event = RowsRemoved(view=view, table_version=int(entry["version"]), **json.loads(entry[_KEY]))
            ledger.append(event, actor=actor)


def _on_disk(pinned: Snapshot) -> Iterator[str]:
    """Paths relative to the table."""
    for bucket in range(pinned.num_buckets):
        for found in list_files(f"{pinned.uri}/{BUCKET}={bucket}", ".parquet"):
            yield f"{BUCKET}={bucket}/{found.rsplit('/', 1)[-1]}"


def _ever_added(uri: str) -> set[str]:
    """The files of all versions; Delta itself forgets those that were removed some time ago."""
    lines = [
        json.loads(line)
        for name in list_files(f"{uri}/_delta_log", ".json")
        for line in read_bytes(name).splitlines()
    ]
    return {line["add"]["path"] for line in lines if "add" in line}


def _files_of(uri: str, version: int) -> set[str]:
    return set(pa.table(DeltaTable(uri, version=version).get_add_actions())["path"].to_pylist())


def _is_young(uri: str) -> bool:
    fs, path = url_to_fs(uri)
    modified: datetime = fs.modified(path)
    return datetime.now(UTC) - modified < GRACE


def _read(pinned: Snapshot, path: str, columns: list[str]) -> pl.DataFrame:
    table = protected_files(pinned.access).read(
        f"{pinned.uri}/{path}", columns, protection=pinned.protection, place=place_of(pinned.uri, path)
    )
    return pl.DataFrame(pl.from_arrow(with_columns(table, columns)))


def _all(names: list[str], where: pl.Expr) -> list[str]:
    return list(dict.fromkeys([*names, *where.meta.root_names()]))


def _true(where: pl.Expr) -> pl.Expr:
    return where.fill_null(False)
