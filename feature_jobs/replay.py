"""`python -m feature_jobs.replay definitions=m view=v [batch=…]`: quarantined rows, tried again once all is mended.

The rows are read as the source had them and go through the view's transform and checks as they are now. The good ones
are stored as new rows of the table, the others stay in quarantine under their new reasons. Each batch's quarantine is
replayed in one transaction under an id that follows from its rows: what stays is written aside, then the good rows are
committed with that id, then the file is exchanged. Killed anywhere in between, the next run finds the id in the table
and only finishes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.core import url_to_fs

from cluster.entrypoint import job
from cluster.errors import Inconsistent, InvalidRequest, SourceError, did_you_mean
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import QuarantineReplayed
from cluster.security.acting import act
from cluster.security.authorization.policy import Action
from cluster.security.encryption.access import protected_files
from cluster.session import require_record
from cluster.settings import PlatformConfig
from cluster.storage import layout, list_files
from feature_jobs.applied import applied_view
from feature_jobs.batches.judging import last_good
from feature_jobs.batches.storing import open_or_create, row_schema
from feature_jobs.store.catalog.lifecycle import heed, read_lifecycles
from feature_jobs.store.catalog.protection import (
    quarantine_place,
    quarantine_protection,
    view_protection,
    view_resources,
)
from feature_jobs.store.definitions.limits import check_buckets
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.profile import Profile
from feature_jobs.store.ingestion.quarantine import quarantined
from feature_jobs.store.ingestion.quarantine_replay import Tried, try_again
from feature_jobs.store.ingestion.validation import FILES
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.types.schema import SEQ


@dataclass(kw_only=True, slots=True)
class ReplayConfig(PlatformConfig):
    """Whose quarantine."""

    definitions: str = "feature_jobs.census"
    view: str = "???"
    batch: str | None = None
    """The `ingest_id` of one batch; none replays all of them."""
    num_buckets: int = 8
    """Of a new table, where no row of the view was stored yet."""

    def __post_init__(self) -> None:
        check_buckets(self.num_buckets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one batch's quarantine lies and what of it is written aside."""

    view: FeatureView
    batch: str
    folder: str
    target: offline.Target

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.batch}.parquet"

    def pending(self, replay_id: str) -> str:
        return f"{self.folder}/pending/{replay_id}.parquet"


@job("replay", ReplayConfig, timed=True)
def main(config: ReplayConfig) -> None:
    """Replay one view's quarantine."""
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="feature_jobs.replay")
    places = layout(config.storage)
    view, spec = applied_view(config.definitions, config.view, ledger)
    heed(read_lifecycles(ledger), [view.name], doing="No quarantined rows are replayed.")
    actor.check(Action.write_features, *view_resources(spec, region=config.cluster.region))
    folder = places.quarantine(view.name)
    table = offline.open_table(places.features(view.name))
    target = offline.Target(
        uri=places.features(view.name),
        keys=tuple(view.join_keys),
        buckets=offline.num_buckets(table) if table is not None else config.num_buckets,
        protection=view_protection(spec),
        access=actor.access,
    )
    baseline = last_good(ledger, view, quarantine=folder, access=actor.access)
    ahead = Ahead.of(config.features.max_ahead_s)
    refusals = []
    for batch in batches(folder, config.batch, view=view.name):
        place = Place(view=view, batch=batch, folder=folder, target=target)
        try:
            event = replay(place, baseline, now=dt.datetime.now(dt.UTC), ahead=ahead)
        except (SourceError, InvalidRequest) as error:  # the other batches may have come from another source
            refusals.append(f"batch {batch}: {error}")
            continue
        say(ledger, event, actor=actor.name)
        finish(place, event)
        print(
            f"view {view.name}: batch {batch}: {event.rows_in} rows in quarantine = {event.rows_stored} stored + "
            f"{event.rows_quarantined} still bad"
        )
    if refusals:
        raise SourceError(f"View '{view.name}': not replayed: {' '.join(refusals)}")


def batches(folder: str, wanted: str | None, *, view: str) -> list[str]:
    """The batches that have rows in quarantine.

    Raises:
        SourceError: there is none, or not the one that was asked for.
    """
    found = [path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in list_files(folder, ".parquet")]
    if wanted is not None and wanted not in found:
        raise SourceError(
            f"View '{view}' has no batch '{wanted}' in quarantine.{did_you_mean(wanted, found)}"
        )
    if not found:
        raise SourceError(f"View '{view}' has no row in quarantine.")
    return found if wanted is None else [wanted]


def replay(
    place: Place, baseline: Profile | None, *, now: dt.datetime, ahead: Ahead = FILES
) -> QuarantineReplayed:
    """Store what is good now, unless a run before has; what stays lies aside for `finish`.

    Raises:
        SchemaMismatch, SourceError: the rows do not fit the view, or another job wrote to the table meanwhile.
        Inconsistent: the rows do not add up; nothing was committed.
    """
    protection = quarantine_protection(place.view.name)
    files = protected_files(place.target.access)
    belongs = quarantine_place(place.view.name, place.batch)
    file = files.read(place.path, protection=protection, place=belongs, unplaced=True)
    replay_id = replay_id_of(place.batch, file)
    table = offline.open_table(place.target.uri)
    before = offline.committed(table, replay_id) if table is not None else None
    if before is not None:
        return event_of(place, *before)
    types = offline.stored_key_types(table, place.view.join_keys)
    tried = try_again(file, place.view, now=now, baseline=baseline, ahead=ahead, key_types=types)
    left = still_bad(file, tried)
    if left.num_rows:
        files.write(left, place.pending(replay_id), protection, place=belongs)
    reasons = Counter(left["reason"].to_pylist())
    batch = offline.Batch(
        ingest_id=replay_id,
        rows_in=file.num_rows,
        rows_stored=file.num_rows - left.num_rows,
        rows_quarantined=left.num_rows,
        reasons=dict(reasons),
        quarantine=f"{place.batch}.parquet" if left.num_rows else None,
    )
    if tried.good is None:
        return event_of(place, batch, None)
    return event_of(place, batch, commit(place, tried.good, batch, now=now))


def still_bad(file: pa.Table, tried: Tried) -> pa.Table:
    """The rows of a quarantine file that stay, with their new reasons."""
    position = file.schema.get_field_index("reason")
    return file.set_column(position, "reason", tried.reasons).filter(pc.is_valid(tried.reasons))


def commit(place: Place, good: pa.Table, batch: offline.Batch, *, now: dt.datetime) -> int:
    """Store good rows as the newest of the table; gives its version."""
    target, schema = place.target, row_schema(good.schema)
    table = open_or_create(target, schema, view=place.view.name)
    seq = offline.last_seq(table)
    count = good.num_rows
    stamped = good.append_column(offline.INGESTED, pa.repeat(pa.scalar(now, offline.TIMESTAMP), count))
    stamped = stamped.append_column(SEQ, pa.array(range(seq + 1, seq + 1 + count), pa.int64()))
    files = offline.write_files(stamped, target, name=batch.ingest_id)
    if sum(file.rows for file in files) + batch.rows_quarantined != batch.rows_in:
        raise Inconsistent(
            f"View '{place.view.name}', batch {place.batch}: {batch.rows_in} rows in quarantine are not "
            f"{sum(file.rows for file in files)} to store + {batch.rows_quarantined} still bad. Nothing was committed."
        )
    return offline.commit(table, schema, files, batch, seq=seq + count)


def replay_id_of(batch: str, file: pa.Table) -> str:
    """The id of a replay: the same as long as no row has left the quarantine."""
    rows = ",".join(map(str, sorted(file[SEQ].to_pylist())))
    return hashlib.sha256(f"replay:{batch}:{rows}".encode()).hexdigest()[:16]


def event_of(place: Place, batch: offline.Batch, version: int | None) -> QuarantineReplayed:
    """What is said in the ledger of a replay."""
    return QuarantineReplayed(
        view=place.view.name,
        view_version=place.view.version,
        batch=place.batch,
        replay_id=batch.ingest_id,
        rows_in=batch.rows_in,
        rows_stored=batch.rows_stored,
        rows_quarantined=batch.rows_quarantined,
        reasons=batch.reasons,
        table_version=version,
    )


def say(ledger: Ledger, event: QuarantineReplayed, *, actor: str) -> None:
    """Record a replay, once; one that stored nothing and changed no reason is none."""
    said = any(
        (entry.payload["replay_id"], entry.payload["table_version"]) == (event.replay_id, event.table_version)
        for entry in ledger.entries(QuarantineReplayed)
    )
    if event.rows_stored == 0:
        said = (
            quarantined((entry.event() for entry in ledger.entries()), event.view).get(event.batch)
            == event.reasons
        )
    if not said:
        ledger.append(event, actor=actor)


def finish(place: Place, event: QuarantineReplayed) -> None:
    """Put what stays in the place of what was replayed."""
    fs, path = url_to_fs(place.path)
    if event.rows_quarantined:
        fs.mv(url_to_fs(place.pending(event.replay_id))[1], path)
    else:
        fs.rm(path)


if __name__ == "__main__":
    main()
