"""Mend a batch that an older release or an older definition stored wrongly: replace its rows with the right rows.

The `ingest_seq` of a row is the first `ingest_seq` of its batch plus the row's position in the source. So reading the
source again gives the right content of every stored row:

- An equal row stays.
- A row that differs is replaced under its own `ingest_seq`, so later corrections still replace it.
- A row that does not pass the checks any more goes to quarantine.
- A row in quarantine that passes now is stored.

Wrong rows disappear from the newest table version only. Older versions keep them, so training sets that pin those
versions can be built again.

A row that is neither in the table nor in the batch's quarantine was removed since, for example by retention, or was
replayed. It is left out. If the process is killed, a second call with the same arguments does the rest.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cluster.errors import SourceError
from cluster.ledger import Ledger
from cluster.ledger.events import BatchMended
from cluster.ledger.table_versions import unrecorded
from feature_jobs.store.ingestion.quarantine_files import COLUMNS, QuarantineFiles
from feature_jobs.store.ingestion.validation import RAW, REASON
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.compaction import replace_files
from feature_jobs.store.offline.removal import file_without
from feature_jobs.store.offline.tables import TIMESTAMP, BucketFile, Snapshot, Target
from feature_jobs.store.types.columns import select_or_null
from feature_jobs.store.types.schema import DELETED, INGESTED, SEQ

_KEY = "falaj.mend"
_QUARANTINE = pa.schema(zip(COLUMNS, (pa.string(), pa.string(), TIMESTAMP, pa.int64()), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLocation:
    """The table and the quarantine of a batch."""

    pinned: Snapshot
    """The newest version of the table."""
    target: Target
    quarantine: QuarantineFiles
    """Quarantine of the view."""

    @property
    def view(self) -> str:
        """Name of the view."""
        return self.quarantine.view


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The difference between the stored rows of a batch and the right rows."""

    unchanged: int
    """Number of stored rows that are right."""
    put: pa.Table
    """Rows to write, with their `ingest_seq`: changed rows, and rows that were in quarantine."""
    changed: int
    """Number of rows in `put` that replace stored rows."""
    outdated: frozenset[int]
    """The `ingest_seq` of stored rows to replace or to remove."""
    bad: pa.Table
    """Rows for quarantine: `reason`, `raw`, `ingest_seq`."""


def mend(
    place: BatchLocation, rows: pa.Table, event: BatchMended, ledger: Ledger, *, actor: str
) -> BatchMended:
    """Replace the stored rows of a batch with the right rows, and return the ledger event.

    Args:
        place: table and quarantine of the batch.
        rows: all rows of the source in order, as `validation.prepare` returns them.
        event: the event without the row counts.
        ledger: receives the event.
        actor: subject that runs the job.

    Raises:
        SourceError: the batch had another number of rows, or another job rewrote the same files at the same time.
    """
    record_mendings(place, ledger, actor=actor)
    quarantined = _read_quarantine(place.quarantine, event.batch)
    difference = compare(place.pinned, _with_sequence(place, rows, event.batch), quarantined)
    event = replace(
        event,
        rows_in=rows.num_rows,
        rows_kept=difference.unchanged,
        rows_changed=difference.changed,
        rows_added=difference.put.num_rows - difference.changed,
        rows_removed=len(difference.outdated) - difference.changed,
        rows_quarantined=difference.bad.num_rows,
        reasons=dict(Counter(difference.bad["reason"].to_pylist())),
    )
    if not difference.put.num_rows and not difference.outdated:
        _write_quarantine(place.quarantine, event.batch, quarantined, difference.bad)
        ledger.append(event, actor=actor)
        return event
    # Until the table is rewritten, the quarantine has the old and the new bad rows, so that a crash loses none.
    still_bad = pc.is_in(quarantined[SEQ], difference.bad[SEQ].combine_chunks())
    all_bad = pa.concat_tables([difference.bad, quarantined.filter(pc.invert(still_bad))])
    _write_quarantine(place.quarantine, event.batch, quarantined, all_bad)
    _rewrite(place, difference, event)
    _write_quarantine(place.quarantine, event.batch, None, difference.bad)
    recorded = record_mendings(place, ledger, actor=actor)
    return recorded[-1] if recorded else event


def compare(pinned: Snapshot, rows: pa.Table, quarantined: pa.Table) -> Difference:
    """Compare the right rows of a batch with its stored rows.

    Args:
        pinned: the table.
        rows: the right rows of the batch, with their `ingest_seq`, `REASON` and `RAW`.
        quarantined: the rows of the batch that are in quarantine.
    """
    numbers = rows[SEQ]
    first, last = pc.min(numbers).as_py(), pc.max(numbers).as_py()
    names = [name for name in rows.column_names if name not in (SEQ, REASON, RAW)]
    stored = _stored_rows(pinned, names, first, last)
    frame = pl.DataFrame(pl.from_arrow(rows.drop_columns([RAW])))
    known = pl.concat([stored[SEQ], pl.Series(SEQ, quarantined[SEQ].to_pylist(), dtype=pl.Int64)])
    frame = frame.filter(pl.col(SEQ).is_in(known.implode()))
    good = frame.filter(pl.col(REASON).is_null()).drop(REASON)
    joined = good.join(stored, on=SEQ, how="left", suffix=":old", maintain_order="left")
    is_stored = pl.col(SEQ).is_in(stored[SEQ].implode())
    differs = pl.any_horizontal(
        pl.col(name).ne_missing(
            pl.col(f"{name}:old").fill_null(False) if name == DELETED else pl.col(f"{name}:old")
        )
        for name in names
    )
    put = joined.filter(~is_stored | differs)
    changed = put.filter(is_stored)[SEQ]
    removed = stored.filter(~pl.col(SEQ).is_in(good[SEQ].implode()))[SEQ]
    bad = frame.filter(pl.col(REASON).is_not_null())[SEQ].to_arrow()
    return Difference(
        unchanged=good.height - put.height,
        put=rows.filter(pc.is_in(numbers, put[SEQ].to_arrow())).drop_columns([REASON, RAW]),
        changed=changed.len(),
        outdated=frozenset([*changed.to_list(), *removed.to_list()]),
        bad=_quarantine_rows(rows.filter(pc.is_in(numbers, bad))),
    )


def record_mendings(place: BatchLocation, ledger: Ledger, *, actor: str) -> list[BatchMended]:
    """Append an event for every mending in the table's history that the ledger lacks, and return these events.

    The ledger lacks a mending when the job was killed after its commit.
    """
    history = DeltaTable(place.target.uri).history()
    mendings = {int(entry["version"]): json.loads(entry[_KEY]) for entry in history if _KEY in entry}
    events = []
    for version in unrecorded(ledger, BatchMended, mendings, view=place.view):
        events.append(BatchMended(**mendings[version] | {"table_version": version}))
        ledger.append(events[-1], actor=actor)
    return events


def _with_sequence(place: BatchLocation, rows: pa.Table, batch: str) -> pa.Table:
    numbers = offline.batch_sequence(place.target.uri, batch)
    if numbers is None or len(numbers) != rows.num_rows:
        recorded = "does not have the batch" if numbers is None else f"has {len(numbers)}"
        raise SourceError(
            f"Batch {batch} of view '{place.view}' cannot be mended: the source has {rows.num_rows} rows, the table's "
            f"history {recorded}. Read the unchanged source of the batch."
        )
    return rows.append_column(SEQ, pa.array(numbers, pa.int64()))


def _stored_rows(pinned: Snapshot, names: Sequence[str], first: int, last: int) -> pl.DataFrame:
    """Return the rows with `ingest_seq` from `first` to `last`; a column that the table lacks is null."""
    parts = []
    for bucket in range(pinned.num_buckets):
        for table in pinned.tables(bucket, [*names, SEQ]):
            frame = pl.DataFrame(pl.from_arrow(select_or_null(table, [*names, SEQ])))
            parts.append(frame.filter(pl.col(SEQ).is_between(first, last)))
    rows = pl.concat(parts, how="vertical_relaxed") if parts else pl.DataFrame(schema={SEQ: pl.Int64})
    missing = [pl.lit(None).alias(name) for name in names if name not in rows.columns]
    return rows.with_columns(missing)


def _rewrite(place: BatchLocation, difference: Difference, event: BatchMended) -> None:
    """Replace the files that contain outdated rows, and add the right rows, in one transaction."""
    pinned, run = place.pinned, uuid.uuid4().hex
    is_outdated = pl.col(SEQ).is_in(sorted(difference.outdated))
    old: list[BucketFile] = []
    new: list[BucketFile] = []
    for number, file in enumerate(pinned.files if difference.outdated else ()):
        if not _has_rows(pinned, file, difference.outdated):
            continue
        old.append(file)
        remaining = file_without(pinned, file, is_outdated, name=f"mended-{run}-{number}")
        new += [] if remaining is None else [remaining]
    if difference.put.num_rows:
        now = pa.repeat(pa.scalar(datetime.now(UTC), TIMESTAMP), difference.put.num_rows)
        rows = difference.put.drop_columns([SEQ]).append_column(INGESTED, now)
        rows = rows.append_column(SEQ, difference.put[SEQ])
        offline.evolve_schema(DeltaTable(pinned.uri), rows.schema, view=place.view)
        target = replace(place.target, buckets=pinned.num_buckets)
        new += offline.write_files(rows, target, name=f"mended-{run}")
    replace_files(pinned, old, new, metadata={_KEY: json.dumps(asdict(event))})


def _has_rows(pinned: Snapshot, file: BucketFile, numbers: frozenset[int]) -> bool:
    """Return whether a file has a row with one of the sequence numbers."""
    with pinned.open(file, whole=False) as opened:
        rows = opened.read([SEQ])
    return not numbers.isdisjoint(rows[SEQ].to_pylist())


def _quarantine_rows(rows: pa.Table) -> pa.Table:
    """Return rows with the columns of a quarantine file."""
    renamed = rows.select([REASON, RAW, SEQ]).rename_columns(["reason", "raw", SEQ])
    now = pa.repeat(pa.scalar(datetime.now(UTC), TIMESTAMP), rows.num_rows)
    return renamed.add_column(2, INGESTED, now)


def _read_quarantine(files: QuarantineFiles, batch: str) -> pa.Table:
    """Read the quarantine file of a batch. Without a file the result has no rows."""
    return files.read(batch).select(_QUARANTINE.names) if files.exists(batch) else _QUARANTINE.empty_table()


def _content(rows: pa.Table) -> list[tuple[int, str, str]]:
    return sorted(zip(*(rows[name].to_pylist() for name in (SEQ, "reason", "raw")), strict=True))


def _write_quarantine(files: QuarantineFiles, batch: str, current: pa.Table | None, rows: pa.Table) -> None:
    """Write the quarantine file of a batch, or delete it if there are no rows.

    `current` is the content of the file. If it has the same rows already, nothing is written; None means write anyway.
    """
    if current is not None and _content(current) == _content(rows):
        return
    if rows.num_rows:
        files.write(batch, rows)
    elif files.exists(batch):
        files.remove(batch)
