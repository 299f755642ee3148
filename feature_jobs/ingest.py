"""`python -m feature_jobs.ingest definitions=m view=v [source.path=…]`: ingest a batch into a feature table.

Rows are read, transformed and checked. Then the batch as a whole is checked. Then the buckets' files are written and
committed. A small batch is processed in this process, a large one in Ray tasks. If the command is killed, run it again.
It ignores files that were not committed. If a batch was committed without its event, the command finds the commit by
the batch's id and appends the event.

With `start=… end=… [chunk=30d]`, only rows with an event time in [start, end) are ingested, and each chunk is its own
batch. The source is read once. A backfill that was killed continues with the missing chunks.

With `again=true`, a source that is stored already is read again, and rows that an older release stored wrongly are
corrected. The same happens automatically if the view's definition has changed so that its rows have other times.

`view=[a,b]` and `view=all` (every view with files or a SQL source) ingest one view after the other. If one view is
refused, the command prints why and continues with the others.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from cluster.entrypoint import job
from cluster.errors import ConfigError, RefusedError, SourceError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import BatchIngested, BatchMended, BatchRefused
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
    ReadableSource,
    open_batch,
    prepare_source,
    read_checked_rows,
    select_batch,
)
from feature_jobs.batches.records import ingested_event, load_history
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
from feature_jobs.batches.spooling import SpooledBatch, spooled, store_spooled
from feature_jobs.batches.storing import StoredBatch, empty_batch, find_committed, store
from feature_jobs.batches.work import Work
from feature_jobs.store.catalog.lifecycle import read_lifecycles, require_not_retired
from feature_jobs.store.catalog.protection import view_resources
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.definitions.limits import validate_num_buckets
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.batch_history import BatchHistory, PlannedBatch
from feature_jobs.store.ingestion.future_limit import FutureLimit
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.ranges import TimeRange, parse_range, parse_span
from feature_jobs.store.offline import tables as offline
from feature_jobs.store.offline.buckets import buckets_for
from feature_jobs.store.types.batch_profile import Profile
from feature_jobs.view_tables import rebucket_advice, stored_columns, view_quarantine, view_target

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
    num_buckets: int | None = None
    """Number of buckets of a new table; null chooses it by the source's size. `feature_jobs.rebucket` changes it."""
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
        if self.num_buckets is not None:
            validate_num_buckets(self.num_buckets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The state that all batches of one view share in one command."""

    config: IngestConfig
    ledger: Ledger
    actor: Actor
    view: FeatureView
    spec: ViewSpec
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
    history = load_history(run.view, run.source, ledger)
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
    key_types = offline.stored_key_types(offline.open_table(places.features(view.name)), view.join_keys)
    source = batch_source(view, config.source.path)
    work = Work(config.task_values, lambda: attach_for_tasks(config, source))
    opened = open_batch(view, source, places, key_types, work)
    new_buckets = config.num_buckets or buckets_for(opened.rows * stored_columns(spec))
    target = view_target(spec, places, actor.access, new_buckets=new_buckets)
    return Run(
        config=config,
        ledger=ledger,
        actor=actor,
        view=view,
        spec=spec,
        source=opened,
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
        plan.ingest_id: earlier for plan in missing if (earlier := find_committed(run.target, plan.ingest_id))
    }
    new = [plan for plan in missing if plan.ingest_id not in committed]
    with ExitStack() as stack:
        rows = read_batches(run, new, stack) if new else {}
        for plan in missing:
            stored = committed.get(plan.ingest_id) or store_batch(run, rows[plan.ingest_id], plan)
            record_batch(run, plan, stored)
    if advice := rebucket_advice(run.spec, layout(run.config.storage), run.actor.access):
        print(advice, flush=True)


def record_batch(run: Run, plan: PlannedBatch, stored: StoredBatch) -> None:
    """Append the event of a stored batch, and print its rows."""
    batch, name = stored.batch, run.view.name
    new = new_columns(run.ledger, name, batch.columns)
    run.ledger.append(ingested_event(run.view, run.source, plan, stored, new), actor=run.actor.name)
    if new:
        print(f"view {name}: new in the source: {', '.join(new)}{describe_ignored(run.view, new)}")
    print(
        f"view {name}: {batch.rows_in} rows in = {batch.rows_stored} stored + "
        f"{batch.rows_quarantined} quarantined, table version {stored.table_version}"
        + (f", {plan.event_range}" if plan.event_range else ""),
        flush=True,
    )


def read_batches(
    run: Run, plans: Sequence[PlannedBatch], stack: ExitStack
) -> Mapping[str, CheckedSource | SpooledBatch]:
    """Read the source, and return the rows of each batch by id: as blocks if the source is small, else in part files.

    Args:
        run: the state of the command.
        plans: the batches to store.
        stack: removes the part files at the end.

    Raises:
        RefusedError: columns do not fit the view; an event for the refusal was appended.
    """
    source = prepare_or_refuse(run)
    with refusals_recorded(run):
        if run.work.in_tasks and source.rows:
            rows = spooled(
                source,
                run.view,
                plans,
                target=run.target,
                baseline=run.baseline,
                max_bad_share=run.config.max_bad_share,
                work=run.work,
            )
            return stack.enter_context(rows)
        whole = read_checked_rows(source, run.view, run.work)
    return {plan.ingest_id: select_batch(whole, plan.event_range, run.work) for plan in plans}


def store_batch(run: Run, rows: CheckedSource | SpooledBatch, plan: PlannedBatch) -> StoredBatch:
    """Check and store one batch.

    Raises:
        RefusedError: the batch was refused; an event for the refusal was appended.
    """
    checked = rows if isinstance(rows, SpooledBatch) else check_batch(rows, run.view, run.baseline, run.work)
    require_good_batch(run, checked)
    if checked.rows == 0:
        table = offline.open_table(run.target.uri)
        version = -1 if table is None else int(table.version())
        return StoredBatch(empty_batch(plan.ingest_id, checked.columns), version)
    name, target, quarantine = plan.ingest_id, run.target, run.quarantine
    if isinstance(checked, SpooledBatch):
        return store_spooled(checked, name, target=target, quarantine=quarantine, work=run.work)
    return store(checked, name, target=target, quarantine=quarantine, work=run.work)


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
    source = prepare_or_refuse(run)
    with refusals_recorded(run):
        rows = read_checked_rows(source, run.view, run.work)
    checked = check_batch(rows, run.view, run.baseline, run.work)
    require_good_batch(run, checked)
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


def prepare_or_refuse(run: Run) -> ReadableSource:
    """Check the first rows of the source.

    Raises:
        RefusedError: columns do not fit the view; an event for the refusal was appended.
    """
    with refusals_recorded(run):
        source = prepare_source(
            run.source,
            run.view,
            run.key_types,
            run.baseline,
            run.work,
            now=dt.datetime.now(dt.UTC),
            ahead=FutureLimit.of(run.config.features.max_ahead_s),
        )
    for name in source.zoneless:
        print(
            f"view {run.view.name}: times in '{name}' have no zone and are taken as UTC; if they are local times, "
            "declare the zone"
        )
    return source


@contextmanager
def refusals_recorded(run: Run) -> Iterator[None]:
    """Append an event if the source is refused while it is read."""
    try:
        yield
    except RefusedError as error:
        record_refusal(run, error)
        raise


def require_good_batch(run: Run, checked: CheckedBatch | SpooledBatch) -> None:
    """Refuse a batch that may not be stored, and append an event for the refusal.

    Raises:
        RefusedError: the batch has too many bad rows, or fails a batch rule.
    """
    if checked.rows == 0 and run.source.rows:  # a chunk without rows
        return
    try:
        require_few_bad_rows(run.view, checked.rows, checked.reasons, max_bad_share=run.config.max_bad_share)
        if run.config.batch_rules is BatchRules.enforce:
            require_no_findings(run.view, checked.result)
    except RefusedError as error:
        record_refusal(run, error, checked)
        raise


def record_refusal(run: Run, error: RefusedError, checked: CheckedBatch | SpooledBatch | None = None) -> None:
    """Append an event for a refused batch, or for a source that could not be read as rows of the view."""
    event = BatchRefused(
        view=run.view.name,
        source=run.config.source.path or run.view.source.path,
        source_digest=run.source.digest,
        reason=str(error),
        rows_in=run.source.rows if checked is None else checked.rows,
        rows_bad=0 if checked is None else checked.rows_bad,
        findings=[] if checked is None else [asdict(finding) for finding in checked.result.findings],
    )
    run.ledger.append(event, actor=run.actor.name)


if __name__ == "__main__":
    main()
