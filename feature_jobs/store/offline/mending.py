"""Mending a batch that an older release, or an older definition, stored wrongly: the same rows in place of the old.

A row of a batch has the `ingest_seq` of its place in the source: the batch's first one plus the rows before it. So the
source read again says of every stored row what it should be. An equal row stays as it is. One that differs is replaced
under its own `ingest_seq`, so corrections that came later still win. One that is not good any more goes to quarantine,
and one that was in quarantine and is good now is stored. The wrong row is gone from the table's newest version; it
stays in the older ones, so training sets that pin them can be built again.

A row that is neither in the table nor in the batch's quarantine was removed since, by retention for one, or replayed.
It is left out. Killed at any point, the same call again finishes the job.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from fsspec.core import url_to_fs

from cluster.errors import SourceError
from cluster.ledger import Ledger
from cluster.ledger.events import BatchMended
from cluster.security.encryption.access import protected_files
from cluster.storage import exists
from feature_jobs.store.catalog.protection import quarantine_place, quarantine_protection
from feature_jobs.store.ingestion.validation import RAW, REASON
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.compaction import change_over
from feature_jobs.store.offline.removal import file_without
from feature_jobs.store.offline.tables import INGESTED, TIMESTAMP, BucketFile, Snapshot, Target
from feature_jobs.store.types.schema import DELETED, SEQ

_KEY = "falaj.mend"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The table and the quarantine of a batch."""

    pinned: Snapshot
    """The table's newest version."""
    target: Target
    quarantine: str
    """Folder of the view's."""
    view: str

    def quarantine_file(self, batch: str) -> str:
        """Where a batch's bad rows lie."""
        return f"{self.quarantine}/{batch}.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What a batch's rows in the table are not, and should be."""

    kept: int
    put: pa.Table
    """Rows to write, with their `ingest_seq`: changed ones, and those that were in quarantine."""
    changed: int
    gone: frozenset[int]
    """The `ingest_seq` of stored rows that are changed or removed."""
    bad: pa.Table
    """Rows for quarantine: `reason`, `raw`, `ingest_seq`."""


def mend(place: Place, rows: pa.Table, said: BatchMended, ledger: Ledger, *, actor: str) -> BatchMended:
    """Put a batch's rows in the place of those that were stored of it; gives the event that stands in the ledger.

    Args:
        place: of the batch.
        rows: all of the source in its order, prepared as of `validation.prepare`.
        said: the event but for what was done.
        ledger: gets it.
        actor: who does it.

    Raises:
        SourceError: the batch had another number of rows, or another job rewrote the same files meanwhile.
    """
    tell(place, ledger, actor=actor)
    before = _quarantined(place, said.batch)
    difference = compare(place.pinned, _numbered(place, rows, said.batch), before)
    event = replace(
        said,
        rows_in=rows.num_rows,
        rows_kept=difference.kept,
        rows_changed=difference.changed,
        rows_added=difference.put.num_rows - difference.changed,
        rows_removed=len(difference.gone) - difference.changed,
        rows_quarantined=difference.bad.num_rows,
        reasons=dict(Counter(difference.bad["reason"].to_pylist())),
    )
    if not difference.put.num_rows and not difference.gone:
        _quarantine(place, said.batch, before, difference.bad)
        ledger.append(event, actor=actor)
        return event
    # First all that is bad or was: a row must not be lost between table and quarantine.
    still = before.filter(pc.invert(pc.is_in(before[SEQ], difference.bad[SEQ].combine_chunks())))
    _quarantine(place, said.batch, before, pa.concat_tables([difference.bad, still]))
    _rewrite(place, difference, event)
    _quarantine(place, said.batch, None, difference.bad)
    told = tell(place, ledger, actor=actor)
    return told[-1] if told else event


def compare(pinned: Snapshot, rows: pa.Table, quarantined: pa.Table) -> Difference:
    """Hold a batch's rows, as they should be, against those that are stored.

    Args:
        pinned: the table.
        rows: all of the batch with their `ingest_seq`, `REASON` and `RAW`.
        quarantined: those of the batch that lie in quarantine.
    """
    numbers = rows[SEQ]
    first, last = pc.min(numbers).as_py(), pc.max(numbers).as_py()
    names = [name for name in rows.column_names if name not in (SEQ, REASON, RAW)]
    stored = _stored(pinned, names, first, last)
    frame = pl.DataFrame(pl.from_arrow(rows.drop_columns([RAW])))
    known = pl.concat([stored[SEQ], pl.Series(SEQ, quarantined[SEQ].to_pylist(), dtype=pl.Int64)])
    frame = frame.filter(pl.col(SEQ).is_in(known.implode()))
    good = frame.filter(pl.col(REASON).is_null()).drop(REASON)
    held = good.join(stored, on=SEQ, how="left", suffix=":old", maintain_order="left")
    there = pl.col(SEQ).is_in(stored[SEQ].implode())
    differs = pl.any_horizontal(
        pl.col(name).ne_missing(
            pl.col(f"{name}:old").fill_null(False) if name == DELETED else pl.col(f"{name}:old")
        )
        for name in names
    )
    put = held.filter(~there | differs)
    changed = put.filter(there)[SEQ]
    removed = stored.filter(~pl.col(SEQ).is_in(good[SEQ].implode()))[SEQ]
    bad = frame.filter(pl.col(REASON).is_not_null())[SEQ].to_arrow()
    chosen = rows.filter(pc.is_in(numbers, put[SEQ].to_arrow())).drop_columns([REASON, RAW])
    return Difference(
        kept=good.height - put.height,
        put=chosen,
        changed=changed.len(),
        gone=frozenset([*changed.to_list(), *removed.to_list()]),
        bad=_as_bad(rows.filter(pc.is_in(numbers, bad))),
    )


def tell(place: Place, ledger: Ledger, *, actor: str) -> list[BatchMended]:
    """Say of every mending in the table's history that it was, also of one whose job was killed; gives the new ones."""
    told = {
        entry.payload["table_version"]
        for entry in ledger.entries(BatchMended)
        if entry.payload["view"] == place.view
    }
    events = []
    for entry in sorted(DeltaTable(place.target.uri).history(), key=lambda one: int(one["version"])):
        if _KEY in entry and int(entry["version"]) not in told:
            said = json.loads(entry[_KEY]) | {"table_version": int(entry["version"])}
            events.append(BatchMended(**said))
            ledger.append(events[-1], actor=actor)
    return events


def _numbered(place: Place, rows: pa.Table, batch: str) -> pa.Table:
    numbers = offline.sequence_of(place.target.uri, batch)
    if numbers is None or len(numbers) != rows.num_rows:
        raise SourceError(
            f"Batch {batch} of view '{place.view}' cannot be mended: the source has {rows.num_rows} rows, and the "
            f"table's history says {'nothing of it' if numbers is None else f'{len(numbers)}'}."
        )
    return rows.append_column(SEQ, pa.array(numbers, pa.int64()))


def _stored(pinned: Snapshot, names: Sequence[str], first: int, last: int) -> pl.DataFrame:
    """The rows of a stretch of sequence numbers, with these columns; one that the table lacks is null."""
    parts = []
    for bucket in range(pinned.num_buckets):
        for table in pinned.tables(bucket, [*names, SEQ]):
            frame = pl.DataFrame(pl.from_arrow(offline.with_columns(table, [*names, SEQ])))
            parts.append(frame.filter(pl.col(SEQ).is_between(first, last)))
    whole = pl.concat(parts, how="vertical_relaxed") if parts else pl.DataFrame(schema={SEQ: pl.Int64})
    lacking = [pl.lit(None).alias(name) for name in names if name not in whole.columns]
    return whole.with_columns(lacking)


def _rewrite(place: Place, difference: Difference, event: BatchMended) -> None:
    pinned, run = place.pinned, uuid.uuid4().hex
    wrong = pl.col(SEQ).is_in(sorted(difference.gone))
    old: list[BucketFile] = []
    new: list[BucketFile] = []
    for number, file in enumerate(pinned.files if difference.gone else ()):
        if not _holds(pinned, file, difference.gone):
            continue
        old.append(file)
        left = file_without(pinned, file, wrong, name=f"mended-{run}-{number}")
        new += [] if left is None else [left]
    if difference.put.num_rows:
        now = pa.repeat(pa.scalar(datetime.now(UTC), TIMESTAMP), difference.put.num_rows)
        rows = difference.put.drop_columns([SEQ]).append_column(INGESTED, now)
        rows = rows.append_column(SEQ, difference.put[SEQ])
        offline.check_schema(DeltaTable(pinned.uri), rows.schema, view=place.view)
        new += offline.write_files(rows, place.target, name=f"mended-{run}")
    change_over(pinned.uri, old, new, said={_KEY: json.dumps(asdict(event))})


def _holds(pinned: Snapshot, file: BucketFile, numbers: frozenset[int]) -> bool:
    found = protected_files(pinned.access).read(
        f"{pinned.uri}/{file.path}",
        [SEQ],
        protection=pinned.protection,
        place=offline.place_of(pinned.uri, file.path),
    )
    return not numbers.isdisjoint(found[SEQ].to_pylist())


def _as_bad(rows: pa.Table) -> pa.Table:
    """Rows as the quarantine has them."""
    found = rows.select([REASON, RAW, SEQ]).rename_columns(["reason", "raw", SEQ])
    now = pa.repeat(pa.scalar(datetime.now(UTC), TIMESTAMP), rows.num_rows)
    return found.add_column(2, INGESTED, now)


def _quarantined(place: Place, batch: str) -> pa.Table:
    """A batch's quarantine; without rows where it has none."""
    path = place.quarantine_file(batch)
    if not exists(path):
        nothing: Mapping[str, pa.DataType] = {
            "reason": pa.string(),
            "raw": pa.string(),
            INGESTED: TIMESTAMP,
            SEQ: pa.int64(),
        }
        return pa.schema(list(nothing.items())).empty_table()
    return (
        protected_files(place.target.access)
        .read(
            path,
            protection=quarantine_protection(place.view),
            place=quarantine_place(place.view, batch),
            unplaced=True,
        )
        .select(["reason", "raw", INGESTED, SEQ])
    )


def _content(rows: pa.Table) -> list[tuple[int, str, str]]:
    return sorted(zip(*(rows[name].to_pylist() for name in (SEQ, "reason", "raw")), strict=True))


def _quarantine(place: Place, batch: str, before: pa.Table | None, rows: pa.Table) -> None:
    """Write a batch's quarantine where it is not what it was."""
    if before is not None and _content(before) == _content(rows):
        return
    path = place.quarantine_file(batch)
    if rows.num_rows:
        protection, belongs = quarantine_protection(place.view), quarantine_place(place.view, batch)
        protected_files(place.target.access).write(rows, path, protection, place=belongs)
    elif exists(path):
        fs, name = url_to_fs(path)
        fs.rm(name)
