"""`python -m feature_jobs.ingest definitions=m view=v [source.path=…]`: ingest a batch into a feature table.

Rows are read, transformed and checked. Then the batch as a whole is checked. Then the buckets' files are written and
committed. A small batch is processed in this process, a large one with Ray Data and Ray tasks. If the command is
killed, run it again. It ignores files that were not committed. If a batch was committed without its event, the command
finds the commit by the batch's id and appends the event.

With `start=… end=… [chunk=30d]`, only rows with an event time in [start, end) are ingested, and each chunk is its own
batch. The source is read once. A backfill that was killed continues with the missing chunks.

With `again=true`, a source that is stored already is read again, and rows that an older release stored wrongly are
corrected. The same happens automatically if the view's definition has changed so that its rows have other times.

`view=[a,b]` and `view=all` (every view with files or a SQL source) ingest one view after the other. If one view is
refused, the command prints why and continues with the others.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from cluster.entrypoint import job
from cluster.errors import ConfigError, RefusedError, SourceError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import BatchIngested, BatchMended, BatchRefused, FeatureViewApplied
from cluster.security.acting import Actor, create_actor
from cluster.security.authorization.policy import Action
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout
from feature_jobs.batches.inputs import applied_view, attach_for_tasks, batch_source
from feature_jobs.batches.mending import mend_batches, report
from feature_jobs.batches.multiple_views import for_each, resolve_views, validate_views, views_with_batches
from feature_jobs.batches.reading import (
    CheckedSource,
    OpenedSource,
    open_batch,
    read_checked_rows,
    select_range,
)
from feature_jobs.batches.rules import (
    BatchRules,
    CheckedBatch,
    check_batch,
    describe_ignored,
    load_baseline,
    new_columns,
    require_few_bad_rows,
    require_no_findings,
)
from feature_jobs.batches.storing import StoredBatch, empty_batch, store
from feature_jobs.batches.work import Work
from feature_jobs.store.catalog.lifecycle import read_lifecycles, require_not_retired
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.definitions.batch_checks import Finding
from feature_jobs.store.definitions.limits import validate_num_buckets
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.batch_history import BatchHistory, PlannedBatch
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.ranges import TimeRange, parse_range, parse_span
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.types.batch_profile import Profile
from feature_jobs.view_tables import view_quarantine, view_target

NUMBERS = ("rows_in", "rows_stored", "rows_quarantined")


@dataclass(kw_only=True, slots=True)
class SourceOverride:
    """The source to read instead of the view's own source."""

    path: str | None = None
    """Path of a file or folder, or a glob. None means the view's own source."""


@dataclass(kw_only=True, slots=True)
class IngestConfig(PlatformConfig):
    """Configuration of `feature_jobs.ingest`."""

    definitions: str = "feature_jobs.census"
    """Module with the definitions."""
    view: Any = "???"
    """A name, a list of names, or `all`."""
    source: SourceOverride = field(default_factory=SourceOverride)
    max_bad_share: float = 0.05
    """Maximum share of bad rows; a batch with more is refused."""
    batch_rules: BatchRules = BatchRules.enforce
    num_buckets: int = 8
    """Number of buckets of a new table. The number of an existing table does not change."""
    task_values: int = 5_000_000
    """Number of values (rows times columns) above which Ray tasks read, check and write the batch."""
    start: str | None = None
    """ISO 8601 instant. With `end`, only rows with an event time in [start, end) are ingested."""
    end: str | None = None
    chunk: str | None = None
    """`30d`, `12h`: split the range into chunks of this length. Each chunk is committed separately."""
    again: bool = False
    """Read a stored source again, and correct the rows that differ."""

    def __post_init__(self) -> None:
        validate_views(self.view)
        if self.chunk is not None and self.start is None:
            raise ValueError("chunk needs start and end.")
        if self.again and self.start is not None:
            raise ValueError("again mends whole batches. Leave out start and end.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {self.max_bad_share}.")
        validate_num_buckets(self.num_buckets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The state that all batches of one view share in one command."""

    config: IngestConfig
    ledger: Ledger
    actor: Actor
    view: FeatureView
    source: OpenedSource
    work: Work
    key_types: dict[str, str]
    """Types of the feature table's join keys."""
    baseline: Profile | None
    """Profile of the last good batch before this command."""
    target: offline.Target
    quarantine: QuarantineFiles


@job("ingest", IngestConfig, timed=True)
def main(config: IngestConfig) -> dict[str, int]:
    """Ingest a batch, or the chunks of a range, for each view."""
    record, ledger = require_running_cluster(config), open_ledger(config)
    actor = create_actor(config, record, ledger, entrypoint="feature_jobs.ingest")
    views = resolve_views(config.view, views_with_batches(config.definitions, ledger))
    if len(views) > 1 and config.source.path is not None:
        raise ConfigError("source.path is the source of one view. Name only that view.")
    before = ledger.head()
    for_each(views, lambda view: ingest(config, ledger, actor, view))
    stored = [e.payload for e in ledger.entries(BatchIngested, after=before) if e.payload["view"] in views]
    return {name: sum(batch[name] for batch in stored) for name in NUMBERS}


def ingest(config: IngestConfig, ledger: Ledger, actor: Actor, name: str) -> None:
    """Ingest one batch of a view, or the chunks of a range.

    Raises:
        RefusedError: the batch was not stored; the message says why.
    """
    view, spec = applied_view(config.definitions, name, ledger)
    require_not_retired(read_lifecycles(ledger), [view.name], doing="No new rows are ingested.")
    actor.check(Action.write_features, *view_resources(spec, region=config.cluster.region))
    event_range, span = parse_range(config.start, config.end), parse_span(config.chunk)
    run = open_run(config, ledger, actor, view, spec)
    history = load_history(run)
    can_mend = history.has_moved_rows and not history.has_partial_batch
    if history.stored and (config.again or can_mend):
        mend_stored(run, history, event_range)
        return
    if history.has_moved_rows:
        print(
            f"view {view.name}: rows of this content stay under other times, of an earlier definition, because they "
            "were ingested in parts and cannot be mended"
        )
    missing = history.missing(event_range, span) if run.source.rows else [history.whole()]
    if not missing:
        print(f"view {view.name}: this content is ingested already; nothing to do")
        return
    ingest_missing(run, missing)


def open_run(config: IngestConfig, ledger: Ledger, actor: Actor, view: FeatureView, spec: ViewSpec) -> Run:
    """Open the source, and load the view's current state.

    Raises:
        SourceError: the source is missing or cannot be read.
    """
    places = layout(config.storage)
    quarantine = view_quarantine(view.name, places, actor.access)
    target = view_target(spec, places, actor.access, new_buckets=config.num_buckets)
    key_types = offline.stored_key_types(offline.open_table(target.uri), view.join_keys)
    source = batch_source(view, config.source.path)
    work = Work(config.task_values, lambda: attach_for_tasks(config, source))
    return Run(
        config=config,
        ledger=ledger,
        actor=actor,
        view=view,
        source=open_batch(view, source, places, key_types, work),
        work=work,
        key_types=key_types,
        baseline=load_baseline(ledger, view, quarantine),
        target=target,
        quarantine=quarantine,
    )


def ingest_missing(run: Run, missing: Sequence[PlannedBatch]) -> None:
    """Store the missing batches, and append an event for each.

    A batch that a killed command has committed already is not stored again; only its event is appended.

    Raises:
        RefusedError: a batch was refused; an event for the refusal was appended.
    """
    committed = {
        plan.ingest_id: earlier for plan in missing if (earlier := find_committed(run, plan)) is not None
    }
    name = run.view.name
    rows = read_or_refuse(run) if len(committed) < len(missing) else CheckedSource(blocks=[], columns=[])
    for plan in missing:
        stored = committed.get(plan.ingest_id) or store_batch(run, rows, plan)
        batch = stored.batch
        new = new_columns(run.ledger, name, batch.columns)
        run.ledger.append(ingested_event(run, plan, stored, new), actor=run.actor.name)
        if new:
            print(f"view {name}: new in the source: {', '.join(new)}{describe_ignored(run.view, new)}")
        print(
            f"view {name}: {batch.rows_in} rows in = {batch.rows_stored} stored + "
            f"{batch.rows_quarantined} quarantined, table version {stored.table_version}"
            + (f", {plan.event_range}" if plan.event_range else ""),
            flush=True,
        )


def find_committed(run: Run, plan: PlannedBatch) -> StoredBatch | None:
    """Return the planned batch if an earlier command committed it but was killed before it appended the event."""
    table = offline.open_table(run.target.uri)
    committed = None if table is None else offline.find_committed_batch(table, plan.ingest_id)
    return None if committed is None else StoredBatch(*committed)


def store_batch(run: Run, rows: CheckedSource, plan: PlannedBatch) -> StoredBatch:
    """Check and store one batch.

    Raises:
        RefusedError: the batch was refused; an event for the refusal was appended.
    """
    if plan.event_range is not None:
        blocks = [run.work.run(select_range, block, plan.event_range, num_cpus=0.1) for block in rows.blocks]
        rows = CheckedSource(blocks=blocks, columns=rows.columns)
    checked = check_or_refuse(run, rows)
    if checked.rows == 0:
        table = offline.open_table(run.target.uri)
        version = -1 if table is None else int(table.version())
        return StoredBatch(empty_batch(plan.ingest_id, checked.columns), version)
    return store(checked, plan.ingest_id, target=run.target, quarantine=run.quarantine, work=run.work)


def mend_stored(run: Run, history: BatchHistory, event_range: TimeRange | None) -> None:
    """Correct the stored rows of this source.

    Raises:
        RefusedError: the source does not fit the view, or a batch cannot be mended.
    """
    if event_range is not None:
        raise SourceError(
            f"View '{run.view.name}' has rows of this content under other times, of an earlier definition. Run the "
            "command once without start and end, which mends them."
        )
    checked = check_or_refuse(run, read_or_refuse(run))
    template = BatchMended(
        view=run.view.name,
        view_version=run.view.version,
        source=run.source.names,
        source_digest=run.source.digest,
    )
    events = mend_batches(
        pa.concat_tables(run.work.get(checked.blocks)),
        history.stored,
        template,
        target=run.target,
        quarantine=run.quarantine,
        ledger=run.ledger,
        actor=run.actor.name,
    )
    for event in events:
        print(report(event))


def load_history(run: Run) -> BatchHistory:
    """Return the view's batches that contain the source's content."""
    content: dict[str, Any] = {"view": run.view.name, "source_digest": run.source.digest}
    entries = [*run.ledger.find(BatchIngested, **content), *run.ledger.find(BatchMended, **content)]
    return BatchHistory(
        run.view.definition(),
        run.source.digest,
        batches=[entry.payload for entry in sorted(entries, key=lambda entry: entry.seq)],
        definitions={
            (run.view.name, entry.payload["version"]): entry.payload["definition"]
            for entry in run.ledger.find(FeatureViewApplied, view=run.view.name)
        },
    )


def read_or_refuse(run: Run) -> CheckedSource:
    """Return all rows, transformed and checked one by one.

    Raises:
        RefusedError: columns do not fit the view; an event for the refusal was appended.
    """
    try:
        rows = read_checked_rows(
            run.source,
            run.view,
            run.key_types,
            run.baseline,
            run.work,
            now=dt.datetime.now(dt.UTC),
            ahead=FutureLimit.of(run.config.features.max_ahead_s),
        )
    except RefusedError as error:
        record_refusal(run, error, rows_in=run.source.rows)
        raise
    for name in rows.zoneless:
        print(
            f"view {run.view.name}: times in '{name}' have no zone and are taken as UTC; if they are local times, "
            "declare the zone"
        )
    return rows


def check_or_refuse(run: Run, rows: CheckedSource) -> CheckedBatch:
    """Return the checked batch if it may be stored. Otherwise append an event for the refusal and raise.

    Raises:
        RefusedError: the batch has too many bad rows, or fails a batch rule.
    """
    checked = check_batch(rows.blocks, run.view, run.baseline, run.work, columns=rows.columns)
    if checked.rows == 0 and run.source.rows:  # a chunk without rows
        return checked
    try:
        require_few_bad_rows(run.view, checked.rows, checked.reasons, max_bad_share=run.config.max_bad_share)
        if run.config.batch_rules is BatchRules.enforce:
            require_no_findings(run.view, checked.result)
        return checked
    except RefusedError as error:
        record_refusal(
            run,
            error,
            rows_in=checked.rows,
            rows_bad=checked.rows_bad,
            findings=checked.result.findings,
        )
        raise


def record_refusal(
    run: Run, error: RefusedError, *, rows_in: int, rows_bad: int = 0, findings: Sequence[Finding] = ()
) -> None:
    """Append an event for a refused batch."""
    event = BatchRefused(
        view=run.view.name,
        source=run.config.source.path or run.view.source.path,
        source_digest=run.source.digest,
        reason=str(error),
        rows_in=rows_in,
        rows_bad=rows_bad,
        findings=[asdict(finding) for finding in findings],
    )
    run.ledger.append(event, actor=run.actor.name)


def ingested_event(run: Run, plan: PlannedBatch, stored: StoredBatch, new: list[str]) -> BatchIngested:
    """Return the event for a stored batch."""
    batch, event_range = stored.batch, plan.event_range
    return BatchIngested(
        view=run.view.name,
        view_version=run.view.version,
        ingest_id=batch.ingest_id,
        source=run.source.names,
        source_digest=run.source.digest,
        start=event_range.start.isoformat() if event_range else None,
        end=event_range.end.isoformat() if event_range else None,
        rows_in=batch.rows_in,
        rows_stored=batch.rows_stored,
        rows_quarantined=batch.rows_quarantined,
        table_version=stored.table_version,
        reasons=batch.reasons,
        quarantine=batch.quarantine,
        profile=batch.profile,
        findings=batch.findings,
        source_columns=batch.columns,
        new_columns=new,
    )


if __name__ == "__main__":
    main()
