"""`python -m feature_jobs.replay definitions=m view=v [batch=…]`: ingest quarantined rows again after a correction.

The rows are read as the source had them. The view's current transform and checks are applied to them. The good rows are
stored as new rows of the table. The other rows stay in quarantine with their new reasons.

Each batch is replayed in one transaction, with an id that is computed from its rows. First the rows that stay are
written to a separate file. Then the good rows are committed with that id. Then the separate file replaces the batch's
file. If the command was killed in between, the next run finds the id in the table and does only the last step.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from cluster.entrypoint import job
from cluster.errors import Inconsistent, InvalidRequest, SourceError, did_you_mean
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import QuarantineReplayed
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout
from feature_jobs.batches.inputs import applied_view
from feature_jobs.batches.rules import load_baseline
from feature_jobs.batches.storing import open_or_create, stored_schema
from feature_jobs.store.catalog.lifecycle import read_lifecycles, require_not_retired
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.definitions.limits import validate_num_buckets
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.quarantine import quarantined
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles, replay_id_of
from feature_jobs.store.ingestion.quarantine_replay import RecheckedRows, recheck_rows
from feature_jobs.store.ingestion.validation import BATCH_LIMIT
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.types.batch_profile import Profile
from feature_jobs.store.types.schema import INGESTED, SEQ
from feature_jobs.view_tables import view_quarantine, view_target


@dataclass(kw_only=True, slots=True)
class ReplayConfig(PlatformConfig):
    """Configuration of `feature_jobs.replay`."""

    definitions: str = "feature_jobs.census"
    """Module with the definitions."""
    view: str = "???"
    batch: str | None = None
    """`ingest_id` of one batch; None replays all batches in quarantine."""
    num_buckets: int = 8
    """Number of buckets of a new table, if no row of the view was stored yet."""

    def __post_init__(self) -> None:
        validate_num_buckets(self.num_buckets)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchReplay:
    """A batch in quarantine, and the table that it is replayed into."""

    view: FeatureView
    batch: str
    files: QuarantineFiles
    target: offline.Target


@job("replay", ReplayConfig, timed=True)
def main(config: ReplayConfig) -> None:
    """Replay one view's quarantine."""
    ledger = open_ledger(config)
    actor = create_actor(config, require_running_cluster(config), ledger, entrypoint="feature_jobs.replay")
    places = layout(config.storage)
    view, spec = applied_view(config.definitions, config.view, ledger)
    require_not_retired(read_lifecycles(ledger), [view.name], doing="No quarantined rows are replayed.")
    actor.check(Action.write_features, *view_resources(spec, region=config.cluster.region))
    files = view_quarantine(view.name, places, actor.access)
    target = view_target(spec, places, actor.access, new_buckets=config.num_buckets)
    baseline = load_baseline(ledger, view, files)
    ahead = FutureLimit.of(config.features.max_ahead_s)
    refusals = []
    for batch in select_batches(files, config.batch):
        batch_replay = BatchReplay(view=view, batch=batch, files=files, target=target)
        try:
            event = replay(batch_replay, baseline, now=dt.datetime.now(dt.UTC), ahead=ahead)
        except (SourceError, InvalidRequest) as error:  # continue: other batches may come from another source
            refusals.append(f"batch {batch}: {error}")
            continue
        record_replay(ledger, event, actor=actor.name)
        finish(files, event)
        print(
            f"view {view.name}: batch {batch}: {event.rows_in} rows in quarantine = {event.rows_stored} stored + "
            f"{event.rows_quarantined} still bad"
        )
    if refusals:
        raise SourceError(f"View '{view.name}': not replayed: {' '.join(refusals)}")


def select_batches(files: QuarantineFiles, wanted: str | None) -> list[str]:
    """Return the batches to replay: the wanted one, or all batches in quarantine.

    Raises:
        SourceError: the quarantine is empty, or does not have the wanted batch.
    """
    batches = files.batches()
    if wanted is not None and wanted not in batches:
        raise SourceError(
            f"View '{files.view}' has no batch '{wanted}' in quarantine.{did_you_mean(wanted, batches)}"
        )
    if not batches:
        raise SourceError(f"View '{files.view}' has no row in quarantine.")
    return batches if wanted is None else [wanted]


def replay(
    batch_replay: BatchReplay, baseline: Profile | None, *, now: dt.datetime, ahead: FutureLimit = BATCH_LIMIT
) -> QuarantineReplayed:
    """Store the rows that are good now. Write the rows that still fail to a separate file, for `finish`.

    Nothing is stored if an earlier run has stored the rows already.

    Raises:
        SchemaMismatch, SourceError: the rows do not fit the view, or another job wrote to the table at the same time.
        Inconsistent: the numbers of rows do not add up; nothing was committed.
    """
    batch, target, view = batch_replay.batch, batch_replay.target, batch_replay.view
    file = batch_replay.files.read(batch)
    replay_id = replay_id_of(batch, file)
    table = offline.open_table(target.uri)
    committed = offline.find_committed_batch(table, replay_id) if table is not None else None
    if committed is not None:
        return replayed_event(batch_replay, *committed)
    key_types = offline.stored_key_types(table, view.join_keys)
    rechecked = recheck_rows(file, view, now=now, baseline=baseline, ahead=ahead, key_types=key_types)
    bad = still_bad(file, rechecked)
    if bad.num_rows:
        batch_replay.files.write_pending(batch, replay_id, bad)
    record = offline.Batch(
        ingest_id=replay_id,
        rows_in=file.num_rows,
        rows_stored=file.num_rows - bad.num_rows,
        rows_quarantined=bad.num_rows,
        reasons=dict(Counter(bad["reason"].to_pylist())),
        quarantine=f"{batch}.parquet" if bad.num_rows else None,
    )
    version = None if rechecked.good is None else commit(batch_replay, rechecked.good, record, now=now)
    return replayed_event(batch_replay, record, version)


def still_bad(file: pa.Table, rechecked: RecheckedRows) -> pa.Table:
    """Return the rows of a quarantine file that stay, with their new reasons."""
    position = file.schema.get_field_index("reason")
    return file.set_column(position, "reason", rechecked.reasons).filter(pc.is_valid(rechecked.reasons))


def commit(batch_replay: BatchReplay, good: pa.Table, record: offline.Batch, *, now: dt.datetime) -> int:
    """Store good rows as the newest rows of the table, and return the table's version."""
    target, schema, view = batch_replay.target, stored_schema(good.schema), batch_replay.view.name
    table = open_or_create(target, schema, view=view)
    target = replace(target, buckets=offline.num_buckets(table))
    seq = offline.last_seq(table)
    num_rows = good.num_rows
    rows = good.append_column(INGESTED, pa.repeat(pa.scalar(now, offline.TIMESTAMP), num_rows))
    rows = rows.append_column(SEQ, pa.array(range(seq + 1, seq + 1 + num_rows), pa.int64()))
    files = offline.write_files(rows, target, name=record.ingest_id)
    num_written = sum(file.rows for file in files)
    if num_written + record.rows_quarantined != record.rows_in:
        raise Inconsistent(
            f"View '{view}', batch {batch_replay.batch}: {record.rows_in} rows in quarantine are not {num_written} to "
            f"store + {record.rows_quarantined} still bad. Nothing was committed."
        )
    return offline.commit(table, schema, files, record, seq=seq + num_rows)


def replayed_event(
    batch_replay: BatchReplay, record: offline.Batch, version: int | None
) -> QuarantineReplayed:
    """Return the event for a replay."""
    return QuarantineReplayed(
        view=batch_replay.view.name,
        view_version=batch_replay.view.version,
        batch=batch_replay.batch,
        replay_id=record.ingest_id,
        rows_in=record.rows_in,
        rows_stored=record.rows_stored,
        rows_quarantined=record.rows_quarantined,
        reasons=record.reasons,
        table_version=version,
    )


def record_replay(ledger: Ledger, event: QuarantineReplayed, *, actor: str) -> None:
    """Append the event of a replay once. A replay that stored no row and changed no reason gets no event."""
    if event.rows_stored == 0:
        batches = quarantined(ledger, event.view)
        is_recorded = batches.get(event.batch) == event.reasons
    else:
        is_recorded = any(
            entry.payload["table_version"] == event.table_version
            for entry in ledger.find(QuarantineReplayed, replay_id=event.replay_id)
        )
    if not is_recorded:
        ledger.append(event, actor=actor)


def finish(files: QuarantineFiles, event: QuarantineReplayed) -> None:
    """Replace the batch's quarantine file by the rows that still fail, or remove it if there are none."""
    if event.rows_quarantined:
        files.publish_pending(event.batch, event.replay_id)
    else:
        files.remove(event.batch)


if __name__ == "__main__":
    main()
