"""Remove rows from a feature table for good: from its newest version, and from the disk.

One transaction replaces the files that contain such rows by files without them. Then every file that still contains
such a row is deleted, whatever version it belongs to. Other files stay. So older versions without such rows, and
training sets that pin these versions, do not change. If the process is killed, a second call with the same arguments
does the rest: it finds the remaining work by reading the files.

`feature_jobs.retain` uses this module.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import polars as pl
from deltalake import DeltaTable

from cluster.ledger import Ledger
from cluster.ledger.events import RowsRemoved, TrainingSetBuilt, TrainingSetNotReproducible
from cluster.ledger.table_versions import unrecorded
from cluster.security.encryption.access import protected_files
from cluster.storage import remove
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.compaction import current_target, replace_files
from feature_jobs.store.offline.parts import bucket_files, ever_added, may_be_in_use
from feature_jobs.store.offline.tables import BucketFile, Snapshot, file_aad
from feature_jobs.store.types.columns import select_or_null

_KEY = "falaj.removal"


@dataclass(frozen=True, kw_only=True, slots=True)
class RemovalReason:
    """Why rows are removed, as recorded in events."""

    cause: str
    older_than: str | None = None
    """ISO 8601 time: rows with an older event are removed. None if rows are not removed by age."""


def remove_rows(
    pinned: Snapshot, where: pl.Expr, reason: RemovalReason, ledger: Ledger, *, view: str, actor: str
) -> int:
    """Remove the rows for which an expression is true from all versions. Return their number in the newest version.

    Args:
        pinned: the newest version of the table.
        where: expression over stored columns. Null means false.
        reason: recorded in the events.
        ledger: receives an event for the removed rows, and one for each training set that cannot be built again.
        view: view of the table.
        actor: subject that runs the job.

    Raises:
        SourceError: another job rewrote the same files at the same time. The same call can be repeated safely.
    """
    counts = count_matching_rows(pinned, where)
    removed = _rewrite_without(pinned, where, counts, reason)
    _record_lost_training_sets(pinned, counts, reason, ledger, view=view, actor=actor)
    for path in counts:
        remove(f"{pinned.uri}/{path}")
    # A training set may have been built from the previous version in the meantime, so check again.
    _record_lost_training_sets(pinned, counts, reason, ledger, view=view, actor=actor)
    _record_removals(pinned.uri, ledger, view=view, actor=actor)
    return removed


def count_matching_rows(pinned: Snapshot, where: pl.Expr) -> dict[str, int]:
    """Return the number of matching rows by file, for every file on disk that has any, in a version or not."""
    known = ever_added(pinned.uri)
    counts = {}
    for path in bucket_files(pinned.uri):
        if path not in known and may_be_in_use(f"{pinned.uri}/{path}"):
            continue
        count = int(_read(pinned, path, where.meta.root_names()).select(_is_true(where).sum()).item())
        if count:
            counts[path] = count
    return counts


def _rewrite_without(
    pinned: Snapshot, where: pl.Expr, counts: Mapping[str, int], reason: RemovalReason
) -> int:
    """Replace the newest version's files that have matching rows, and return the number of removed rows."""
    old = [file for file in pinned.files if file.path in counts]
    if not old:
        return 0
    removed = sum(counts[file.path] for file in old)
    run = uuid.uuid4().hex
    files = (
        file_without(pinned, file, where, name=f"kept-{run}-{number}") for number, file in enumerate(old)
    )
    new = [file for file in files if file is not None]
    content = asdict(reason) | {
        "rows_before": pinned.rows,
        "rows_after": pinned.rows - removed,
        "files": len(old),
    }
    replace_files(pinned, old, new, metadata={_KEY: json.dumps(content)})
    return removed


def file_without(pinned: Snapshot, file: BucketFile, where: pl.Expr, *, name: str) -> BucketFile | None:
    """Write a copy of a file without the matching rows; None if no row is left."""
    with pinned.open(file) as opened:
        table = opened.read()
    columns = list(dict.fromkeys([*table.column_names, *where.meta.root_names()]))
    rows = pl.DataFrame(pl.from_arrow(select_or_null(table, columns)))
    rows = rows.filter(~_is_true(where)).select(table.column_names)
    if rows.is_empty():
        return None
    return offline.write_bucket(rows, table.schema, current_target(pinned), bucket=file.bucket, name=name)


def _record_lost_training_sets(
    pinned: Snapshot,
    counts: Mapping[str, int],
    reason: RemovalReason,
    ledger: Ledger,
    *,
    view: str,
    actor: str,
) -> None:
    """Append one event for each training set that cannot be built again, unless the ledger has it already.

    These are the training sets that pin a table version with a file in `counts`.
    """
    is_lost: dict[int, bool] = {}
    for entry in list(ledger.entries(TrainingSetBuilt)):
        version = entry.payload["table_versions"].get(view)
        if version is None or ledger.newest(TrainingSetNotReproducible, training_set=entry.seq, view=view):
            continue
        if version not in is_lost:
            files = offline.files_of(DeltaTable(pinned.uri, version=version))
            is_lost[version] = any(file.path in counts for file in files)
        if is_lost[version]:
            event = TrainingSetNotReproducible(
                training_set=entry.seq,
                service=entry.payload["service"],
                row_hash=entry.payload["row_hash"],
                view=view,
                table_version=version,
                cause=reason.cause,
            )
            ledger.append(event, actor=actor)


def _record_removals(uri: str, ledger: Ledger, *, view: str, actor: str) -> None:
    """Append an event for every removal in the table's history that the ledger lacks, also if the job was killed."""
    history = DeltaTable(uri).history()
    removals = {int(entry["version"]): json.loads(entry[_KEY]) for entry in history if _KEY in entry}
    for version in unrecorded(ledger, RowsRemoved, removals, view=view):
        ledger.append(RowsRemoved(view=view, table_version=version, **removals[version]), actor=actor)


def _read(pinned: Snapshot, path: str, columns: list[str]) -> pl.DataFrame:
    table = protected_files(pinned.access).read(
        f"{pinned.uri}/{path}", columns, protection=pinned.protection, place=file_aad(pinned.uri, path)
    )
    return pl.DataFrame(pl.from_arrow(select_or_null(table, columns)))


def _is_true(where: pl.Expr) -> pl.Expr:
    return where.fill_null(False)
