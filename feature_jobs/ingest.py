"""`python -m feature_jobs.ingest definitions=m view=v [source.path=…]`: a batch from its source into a feature table.

Ray Data reads, transforms and checks; then it is decided whether the batch is fit to be stored at all; then Ray tasks
write the buckets' files and the driver commits them. Killed at any point, the same command run again finishes the job:
files without a commit are dead weight, and a commit without its event is found by the batch's id.
"""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from deltalake import DeltaTable
from ray.exceptions import RayError, RayTaskError

from cluster.entrypoint import job
from cluster.errors import BatchRefused, DefinitionError, Inconsistent, RefusedError, SourceError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import BatchIngested
from cluster.ledger.events import BatchRefused as BatchRefusedEvent
from cluster.security.acting import Actor, act
from cluster.security.keys.access import protected_files
from cluster.security.policy import Action
from cluster.session import attach, refusal_behind
from cluster.settings import PlatformConfig
from cluster.storage import layout
from feature_jobs.batch import Judged, judge, keep, last_good, new_columns, settle
from feature_jobs.store import offline
from feature_jobs.store.batches import next_batch
from feature_jobs.store.catalog import ViewSpec, load_definitions, view_spec
from feature_jobs.store.definitions import FeatureView
from feature_jobs.store.files import SourceFiles, head, open_source
from feature_jobs.store.lifecycle import heed, read_lifecycles
from feature_jobs.store.point_in_time import SEQ
from feature_jobs.store.profile import Profile
from feature_jobs.store.protection import (
    quarantine_place,
    quarantine_protection,
    view_protection,
    view_resources,
)
from feature_jobs.store.recorded import read_recorded
from feature_jobs.store.validation import RAW, REASON, prepare_part

HEAD_ROWS = 1000
BATCH_ROWS = 131_072


class BatchRules(enum.Enum):
    """What becomes of a batch for which a batch rule of the view does not hold."""

    enforce = "enforce"
    """It is refused."""
    report = "report"
    """It is stored, the findings stand in its event, and the next batch is compared with it."""


@dataclass(kw_only=True, slots=True)
class SourceOverride:
    """Where the batch comes from, if not from the view's own source."""

    path: str | None = None


@dataclass(kw_only=True, slots=True)
class IngestConfig(PlatformConfig):
    """What is ingested."""

    definitions: str = "feature_jobs.census"
    view: str = "???"
    source: SourceOverride = field(default_factory=SourceOverride)
    max_bad_share: float = 0.05
    """Above this share of bad rows the whole batch is refused."""
    batch_rules: BatchRules = BatchRules.enforce
    num_buckets: int = 8
    """Of a new table; a table keeps the number it was made with."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {self.max_bad_share}.")
        if self.num_buckets < 1:
            raise ValueError(f"num_buckets must be at least 1, got {self.num_buckets}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A batch after transform and checks: its blocks in source order."""

    blocks: list[Any]
    """Object references to validated tables."""
    sizes: list[int]
    reasons: dict[str, int]
    judged: Judged
    columns: list[str]
    """Of the source."""

    @property
    def rows_bad(self) -> int:
        return sum(self.reasons.values())


@job("ingest", IngestConfig)
def main(config: IngestConfig) -> None:
    """Ingest one batch."""
    ledger = open_ledger(config)
    actor = act(config, attach(config), ledger, entrypoint="feature_jobs.ingest")
    places = layout(config.storage)
    view, spec = applied_view(config.definitions, config.view, ledger)
    heed(read_lifecycles(ledger), [view.name], doing="No new rows are ingested.")
    actor.check(Action.write_features, *view_resources(spec, region=config.cluster.region))
    files = open_source(config.source.path or view.source.path, places)
    ingest_id = next_id(ledger, view, files)
    if ingest_id is None:
        print(f"view {view.name}: this content is ingested already; nothing to do")
        return
    uri = places.features(view.name)
    table = offline.open_table(uri)
    before = offline.committed(table, ingest_id) if table is not None else None
    if before is None:
        quarantine = places.quarantine(view.name)
        baseline = last_good(ledger, view, quarantine=quarantine, access=actor.access)
        checked = check_or_refuse(config, ledger, actor, view, files, baseline)
        target = offline.Target(
            uri=uri,
            keys=tuple(view.join_keys),
            buckets=offline.num_buckets(table) if table is not None else config.num_buckets,
            protection=view_protection(spec),
            access=actor.access,
        )
        before = store(view, checked, ingest_id, target=target, quarantine=quarantine)
    batch, version = before
    new = new_columns(ledger, view.name, batch.columns)
    ledger.append(event_of(view, files, batch, version, new), actor=actor.name)
    if new:
        print(f"view {view.name}: new in the source: {', '.join(new)}{unread(view, new)}")
    print(
        f"view {view.name}: {batch.rows_in} rows in = {batch.rows_stored} stored + "
        f"{batch.rows_quarantined} quarantined, table version {version}"
    )


def applied_view(definitions: str, name: str, ledger: Ledger) -> tuple[FeatureView, ViewSpec]:
    """The view as its module defines it and as it was applied, which is the same.

    Raises:
        DefinitionError: it was not applied, or was changed since.
    """
    view = load_definitions(definitions).view(name)
    spec = view_spec(ledger, view.name)
    if spec.version != view.version:
        raise DefinitionError(
            f"View '{view.name}' was changed since it was applied. "
            f"Run `python -m feature_jobs.apply definitions={definitions}`."
        )
    return view, spec


def next_id(ledger: Ledger, view: FeatureView, files: SourceFiles) -> str | None:
    """The id of the batch; none where the view has the rows that it would make of these files."""
    return next_batch(
        view.definition(),
        files.digest,
        batches=(entry.payload for entry in ledger.entries(BatchIngested)),
        definitions={key: one.definition for key, one in read_recorded(ledger).views.items()},
    )


def check(view: FeatureView, files: SourceFiles, baseline: Profile | None, *, now: dt.datetime) -> Checked:
    """Read, transform and check the whole batch with Ray Data.

    Raises:
        RefusedError: columns that do not fit the view.
        Inconsistent: Ray Data gave another number of rows than the files have.
    """
    heads = [head(path, HEAD_ROWS) for path in files.paths]
    for first in heads:
        prepare_part(first, view, now=now)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    # The newer reader starts a pool of actors to read footers, which takes longer than a batch of this size.
    context.use_datasource_v2 = False
    dataset = ray.data.read_parquet(files.paths).map_batches(
        lambda block: prepare_part(block, view, now=now, baseline=baseline),
        batch_format="pyarrow",
        batch_size=BATCH_ROWS,
        zero_copy_batch=True,
    )
    try:
        blocks = settle(dataset.to_arrow_refs(), view)
        counts = ray.get([_count.remote(block) for block in blocks])
    except RayError as error:
        raise unreadable(refusal_behind(error), files) from error
    sizes = [size for size, _ in counts]
    if sum(sizes) != files.rows:
        raise Inconsistent(f"View '{view.name}': the files have {files.rows} rows, {sum(sizes)} were read.")
    reasons: Counter[str] = Counter()
    for _, of_block in counts:
        reasons.update(of_block)
    judged = judge(blocks, view, baseline, now=now)
    columns = list(dict.fromkeys(name for first in heads for name in first.column_names))
    return Checked(blocks=blocks, sizes=sizes, reasons=dict(reasons), judged=judged, columns=columns)


def unreadable(error: BaseException, files: SourceFiles) -> BaseException:
    """An error of reading as a refusal that names the source; any other as it is."""
    if not isinstance(error, RayTaskError) or not isinstance(error.cause, OSError | pa.ArrowException):
        return error
    return SourceError(f"Source {', '.join(files.paths)} cannot be read: {str(error.cause).splitlines()[0]}")


def check_or_refuse(
    config: IngestConfig,
    ledger: Ledger,
    actor: Actor,
    view: FeatureView,
    files: SourceFiles,
    baseline: Profile | None,
) -> Checked:
    """The checked batch, fit to be stored; a batch that is not leaves an event before it is refused.

    Raises:
        RefusedError: columns that do not fit the view, too many bad rows, or a batch rule that does not hold.
    """
    rows_bad, found, now = 0, [], dt.datetime.now(dt.UTC)
    try:
        checked = check(view, files, baseline, now=now)
        rows_bad = checked.rows_bad
        decide(config, view, files, checked)
        found = [asdict(finding) for finding in checked.judged.findings]
        if config.batch_rules is BatchRules.enforce:
            refuse_unlike(view, checked.judged)
        return checked
    except RefusedError as error:
        event = BatchRefusedEvent(
            view=view.name,
            source=config.source.path or view.source.path,
            source_digest=files.digest,
            reason=str(error),
            rows_in=files.rows,
            rows_bad=rows_bad,
            findings=found,
        )
        ledger.append(event, actor=actor.name)
        raise


def decide(config: IngestConfig, view: FeatureView, files: SourceFiles, checked: Checked) -> None:
    """Refuse a batch with too many bad rows before any of it is written.

    Raises:
        BatchRefused: with the most frequent reason.
    """
    share = checked.rows_bad / files.rows
    if share <= config.max_bad_share:
        return
    reason, count = max(checked.reasons.items(), key=lambda item: item[1])
    raise BatchRefused(
        f"View '{view.name}': {share:.1%} of {files.rows} rows are bad, at most {config.max_bad_share:.1%} may be; "
        f"mostly: {reason} ({count}). Nothing was stored. Mend the source, or raise max_bad_share."
    )


def refuse_unlike(view: FeatureView, judged: Judged) -> None:
    """Refuse a batch for which a batch rule does not hold.

    Raises:
        BatchRefused: naming all of them.
    """
    if judged.findings:
        said = "; ".join(finding.said for finding in judged.findings)
        raise BatchRefused(
            f"View '{view.name}': {said}. Nothing was stored. Mend the source, or let it be with batch_rules=report."
        )


def store(
    view: FeatureView, checked: Checked, ingest_id: str, *, target: offline.Target, quarantine: str
) -> tuple[offline.Batch, int]:
    """Write the good rows to their buckets and the bad ones to quarantine, then commit.

    Raises:
        Inconsistent: rows in are not rows stored and quarantined; nothing was committed.
    """
    schema = row_schema(ray.get(_schema.remote(checked.blocks[0])))
    table = offline.open_table(target.uri)
    if table is None:
        table = offline.create_table(target.uri, schema, num_buckets=target.buckets)
    offline.check_schema(table, schema, view=view.name)
    table = DeltaTable(target.uri)
    seq = offline.last_seq(table)
    parts = []
    for block, size in zip(checked.blocks, checked.sizes, strict=True):
        name = f"{ingest_id}-{uuid.uuid4().hex[:8]}"
        parts.append(_write.remote(block, seq + 1, target, name))
        seq += size
    written = ray.get(parts)
    files = [file for of_block, _ in written for file in of_block]
    bad = pa.concat_tables([rows for _, rows in written])
    batch = offline.Batch(
        ingest_id=ingest_id,
        rows_in=sum(checked.sizes),
        rows_stored=sum(file.rows for file in files),
        rows_quarantined=bad.num_rows,
        reasons=checked.reasons,
        quarantine=f"{ingest_id}.parquet" if bad.num_rows else None,
        profile=checked.judged.profile.summary(),
        findings=[asdict(finding) for finding in checked.judged.findings],
        columns=checked.columns,
    )
    if batch.rows_stored + batch.rows_quarantined != batch.rows_in:
        raise Inconsistent(
            f"View '{view.name}': {batch.rows_in} rows in are not {batch.rows_stored} stored + "
            f"{batch.rows_quarantined} quarantined. Nothing was committed."
        )
    if batch.quarantine is not None:
        protection = quarantine_protection(view.name)
        place = quarantine_place(view.name, ingest_id)
        protected_files(target.access).write(bad, f"{quarantine}/{batch.quarantine}", protection, place=place)
    keep(checked.judged.profile, view, ingest_id, quarantine=quarantine, access=target.access)
    return batch, offline.commit(table, schema, files, batch, seq=seq)


def unread(view: FeatureView, columns: list[str]) -> str:
    """The tail of a message that says which columns of a source a view leaves; a transform may read them all."""
    source = view.source
    times = (source.event_timestamp, source.created_timestamp)
    read = {*view.join_keys, *(field.name for field in view.schema), *times}
    ignored = [name for name in columns if name not in read and view.transform is None]
    return f"; ignored, because the view does not have them: {', '.join(ignored)}" if ignored else ""


def event_of(
    view: FeatureView, files: SourceFiles, batch: offline.Batch, version: int, new: list[str]
) -> BatchIngested:
    """What is said in the ledger of a batch that is in the table."""
    return BatchIngested(
        view=view.name,
        view_version=view.version,
        ingest_id=batch.ingest_id,
        source=", ".join(path.rsplit("/", 1)[-1] for path in files.paths),
        source_digest=files.digest,
        rows_in=batch.rows_in,
        rows_stored=batch.rows_stored,
        rows_quarantined=batch.rows_quarantined,
        table_version=version,
        reasons=batch.reasons,
        quarantine=batch.quarantine,
        profile=batch.profile,
        findings=batch.findings,
        source_columns=batch.columns,
        new_columns=new,
    )


def row_schema(validated: pa.Schema) -> pa.Schema:
    """The stored columns of validated rows."""
    kept = [column for column in validated if column.name not in (REASON, RAW)]
    return pa.schema([*kept, pa.field(offline.INGESTED, offline.TIMESTAMP), pa.field(SEQ, pa.int64())])


@ray.remote(num_cpus=0.1)
def _count(block: pa.Table) -> tuple[int, dict[str, int]]:
    reasons = pc.value_counts(block[REASON].drop_null()).to_pylist()
    return block.num_rows, {one["values"]: one["counts"] for one in reasons}


@ray.remote(num_cpus=0.1)
def _schema(block: pa.Table) -> pa.Schema:
    return block.schema


@ray.remote
def _write(
    block: pa.Table, first_seq: int, target: offline.Target, name: str
) -> tuple[list[offline.BucketFile], pa.Table]:
    now = pa.scalar(dt.datetime.now(dt.UTC), offline.TIMESTAMP)
    count = block.num_rows
    block = block.append_column(offline.INGESTED, pa.repeat(now, count))
    block = block.append_column(SEQ, pa.array(range(first_seq, first_seq + count), pa.int64()))
    good = block.filter(pc.is_null(block[REASON])).drop_columns([REASON, RAW])
    bad = block.filter(pc.is_valid(block[REASON])).select([REASON, RAW, offline.INGESTED, SEQ])
    bad = bad.rename_columns(["reason", "raw", offline.INGESTED, SEQ])
    return offline.write_files(good, target, name=name) if good.num_rows else [], bad


if __name__ == "__main__":
    main()
