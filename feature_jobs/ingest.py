"""`python -m feature_jobs.ingest definitions=m view=v [source.path=…]`: a batch from its source into a feature table.

Rows are read, transformed and checked; then it is decided whether the batch is fit to be stored at all; then the
buckets' files are written and committed. This process does all of it while the batch is small, Ray Data and Ray tasks
do it once it is large. Killed at any point, the same command run again finishes the job: files without a commit are
dead weight, and a commit without its event is found by the batch's id.

With `start=… end=… [chunk=30d]` only rows whose event lies in [start, end) are taken, each chunk a batch of its own.
The source is read once; a backfill that was killed goes on with the chunks that are left.

With `again=true` a source that is stored already is read again, and rows that an older release stored wrongly are put
right. The same happens by itself where the view's definition has moved the times of its rows since.

`view=[a,b]` and `view=all` (every view that has files or a table as its source) take one view after the other. What is
refused of one is said and does not keep the others from being stored.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.entrypoint import job
from cluster.errors import ConfigError, RefusedError, SourceError
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import BatchIngested, BatchMended
from cluster.ledger.events import BatchRefused as BatchRefusedEvent
from cluster.security.acting import Actor, act
from cluster.security.authorization.policy import Action
from cluster.session import attach, require_record
from cluster.settings import PlatformConfig
from cluster.storage import layout
from feature_jobs.applied import applied_view, given_source
from feature_jobs.batches.again import mend_batches, report
from feature_jobs.batches.judging import (
    judge,
    last_good,
    new_columns,
    refuse_bad,
    refuse_unlike,
    settle,
    unread,
)
from feature_jobs.batches.reading import Opened, Prepared, open_batch, prepared, within
from feature_jobs.batches.several import check_views, chosen, for_each, with_batches
from feature_jobs.batches.storing import Checked, nothing, store
from feature_jobs.batches.work import Work
from feature_jobs.store.catalog.lifecycle import heed, read_lifecycles
from feature_jobs.store.catalog.protection import view_protection, view_resources
from feature_jobs.store.catalog.recorded import read_recorded
from feature_jobs.store.catalog.specifications import ViewSpec
from feature_jobs.store.definitions.limits import check_buckets
from feature_jobs.store.definitions.views import FeatureView
from feature_jobs.store.ingestion.ahead import Ahead
from feature_jobs.store.ingestion.batch_checks import Finding
from feature_jobs.store.ingestion.batches import Ingested, Wanted
from feature_jobs.store.ingestion.profile import Profile
from feature_jobs.store.ingestion.ranges import parse_range, parse_span
from feature_jobs.store.ingestion.validation import REASON
from feature_jobs.store.offline import tables as offline


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
    view: Any = "???"
    """A name, a list of names, or `all`."""
    source: SourceOverride = field(default_factory=SourceOverride)
    max_bad_share: float = 0.05
    """Above this share of bad rows the whole batch is refused."""
    batch_rules: BatchRules = BatchRules.enforce
    num_buckets: int = 8
    """Of a new table; a table keeps the number it was made with."""
    task_values: int = 5_000_000
    """Rows times columns of a source above which Ray tasks read, check and write it."""
    start: str | None = None
    """ISO 8601; with `end`, only rows whose event lies in [start, end) are taken."""
    end: str | None = None
    chunk: str | None = None
    """`30d`, `12h`: the range in parts of this length, each committed by itself."""
    again: bool = False
    """Read what is stored already once more, and mend the rows that are not as they should be."""

    def __post_init__(self) -> None:
        check_views(self.view)
        if self.chunk is not None and self.start is None:
            raise ValueError("chunk needs start and end.")
        if self.again and self.start is not None:
            raise ValueError("again mends whole batches. Leave start and end away.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be between 0 and 1, got {self.max_bad_share}.")
        check_buckets(self.num_buckets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What all batches of one command share."""

    config: IngestConfig
    ledger: Ledger
    actor: Actor
    view: FeatureView
    files: Opened
    work: Work
    keys: dict[str, str]
    """Types of the join keys that the feature table has."""
    baseline: Profile | None
    """Of the last good batch before."""
    target: offline.Target
    quarantine: str


@job("ingest", IngestConfig, timed=True)
def main(config: IngestConfig) -> None:
    """Ingest each view's batch, or the chunks of a range."""
    record, ledger = require_record(config), open_ledger(config)
    actor = act(config, record, ledger, entrypoint="feature_jobs.ingest")
    views = chosen(config.view, with_batches(config.definitions, ledger))
    if len(views) > 1 and config.source.path is not None:
        raise ConfigError("source.path is the source of one view. Name that view alone.")
    for_each(views, lambda view: ingest(config, ledger, actor, view))


def ingest(config: IngestConfig, ledger: Ledger, actor: Actor, name: str) -> None:
    """Ingest one batch of a view, or the chunks of a range.

    Raises:
        RefusedError: what is not stored, and why.
    """
    view, spec = applied_view(config.definitions, name, ledger)
    heed(read_lifecycles(ledger), [view.name], doing="No new rows are ingested.")
    actor.check(Action.write_features, *view_resources(spec, region=config.cluster.region))
    wanted, span = parse_range(config.start, config.end), parse_span(config.chunk)
    run = open_run(config, ledger, actor, view, spec)
    found = ingested(run)
    if found.earlier and (config.again or (found.moved and not found.in_parts)):
        if wanted is not None:
            raise SourceError(
                f"View '{view.name}' has rows of this content under other times, of an earlier definition. Run the "
                "command once without start and end, which mends them."
            )
        mend_stored(run, found)
        return
    if found.moved:
        print(
            f"view {view.name}: rows of this content stay under other times, of an earlier definition, because they "
            "were ingested in parts and cannot be mended"
        )
    missing = found.missing(wanted, span) if run.files.rows else [found.whole()]
    if not missing:
        print(f"view {view.name}: this content is ingested already; nothing to do")
        return
    before = {one: again for one in missing if (again := found_again(run, one)) is not None}
    rows = read_or_refuse(run) if len(before) < len(missing) else Prepared(blocks=[], columns=[])
    for one in missing:
        batch, version = before.get(one) or store_one(run, rows, one)
        new = new_columns(ledger, view.name, batch.columns)
        ledger.append(event_of(run, one, batch, version, new), actor=actor.name)
        if new:
            print(f"view {view.name}: new in the source: {', '.join(new)}{unread(view, new)}")
        print(
            f"view {view.name}: {batch.rows_in} rows in = {batch.rows_stored} stored + "
            f"{batch.rows_quarantined} quarantined, table version {version}"
            + (f", {one.range}" if one.range else ""),
            flush=True,
        )


def open_run(config: IngestConfig, ledger: Ledger, actor: Actor, view: FeatureView, spec: ViewSpec) -> Run:
    """Open the source, and find out what there is of the view.

    Raises:
        SourceError: the source is missing or unreadable.
    """
    places = layout(config.storage)
    uri, quarantine = places.features(view.name), places.quarantine(view.name)
    table = offline.open_table(uri)
    keys = offline.stored_key_types(table, view.join_keys)
    work = Work(config.task_values, lambda: attach(config))
    return Run(
        config=config,
        ledger=ledger,
        actor=actor,
        view=view,
        files=open_batch(view, given_source(view, config.source.path), places, keys, work),
        work=work,
        keys=keys,
        baseline=last_good(ledger, view, quarantine=quarantine, access=actor.access),
        target=offline.Target(
            uri=uri,
            keys=tuple(view.join_keys),
            buckets=offline.num_buckets(table) if table is not None else config.num_buckets,
            protection=view_protection(spec),
            access=actor.access,
        ),
        quarantine=quarantine,
    )


def found_again(run: Run, wanted: Wanted) -> tuple[offline.Batch, int] | None:
    """A batch that was committed by a run that was killed before it could say so."""
    table = offline.open_table(run.target.uri)
    return None if table is None else offline.committed(table, wanted.ingest_id)


def store_one(run: Run, rows: Prepared, wanted: Wanted) -> tuple[offline.Batch, int]:
    """Check and store one batch; gives it and the table's version.

    Raises:
        RefusedError: it is not fit to be stored; an event says so.
    """
    if wanted.range is not None:
        blocks = [run.work.run(within, block, wanted.range, num_cpus=0.1) for block in rows.blocks]
        rows = Prepared(blocks=blocks, columns=rows.columns)
    checked = check_or_refuse(run, rows)
    if checked.rows == 0:
        table = offline.open_table(run.target.uri)
        return nothing(wanted.ingest_id, checked.columns), -1 if table is None else int(table.version())
    return store(
        run.view,
        checked,
        wanted.ingest_id,
        target=run.target,
        quarantine=run.quarantine,
        work=run.work,
    )


def mend_stored(run: Run, found: Ingested) -> None:
    """Put rows right that are stored of this source.

    Raises:
        RefusedError: the source does not fit the view, or a batch cannot be mended.
    """
    checked = check_or_refuse(run, read_or_refuse(run))
    said = BatchMended(
        view=run.view.name,
        view_version=run.view.version,
        source=run.files.names,
        source_digest=run.files.digest,
    )
    events = mend_batches(
        pa.concat_tables(run.work.get(checked.blocks)),
        found.earlier,
        said,
        target=run.target,
        quarantine=run.quarantine,
        ledger=run.ledger,
        actor=run.actor.name,
    )
    for event in events:
        print(report(event))


def ingested(run: Run) -> Ingested:
    """What the view has of the source's content."""
    entries = [*run.ledger.entries(BatchIngested), *run.ledger.entries(BatchMended)]
    return Ingested(
        run.view.definition(),
        run.files.digest,
        batches=[entry.payload for entry in sorted(entries, key=lambda entry: entry.seq)],
        definitions={key: one.definition for key, one in read_recorded(run.ledger).views.items()},
    )


def read_or_refuse(run: Run) -> Prepared:
    """All rows, transformed and checked one by one.

    Raises:
        RefusedError: columns that do not fit the view; an event says so.
    """
    try:
        ahead = Ahead.of(run.config.features.max_ahead_s)
        now = dt.datetime.now(dt.UTC)
        rows = prepared(run.files, run.view, run.keys, run.baseline, run.work, now=now, ahead=ahead)
        for name in rows.zoneless:
            print(
                f"view {run.view.name}: times in '{name}' have no zone and are taken as UTC; if local, declare it"
            )
        return rows
    except RefusedError as error:
        say_refused(run, error, rows_in=run.files.rows)
        raise


def check(run: Run, rows: Prepared) -> Checked:
    """Count the rows of a batch and judge it as a whole."""
    work = run.work
    settled = settle(rows.blocks, run.view, work)
    counts = work.get([work.run(_count, block, num_cpus=0.1) for block in settled])
    reasons: Counter[str] = Counter()
    for _, of_block in counts:
        reasons.update(of_block)
    judged = judge(settled, run.view, run.baseline, work, now=dt.datetime.now(dt.UTC))
    return Checked(
        blocks=settled,
        sizes=[size for size, _ in counts],
        reasons=dict(reasons),
        judged=judged,
        columns=rows.columns,
    )


def check_or_refuse(run: Run, rows: Prepared) -> Checked:
    """The checked batch, fit to be stored; a batch that is not leaves an event before it is refused.

    Raises:
        RefusedError: too many bad rows, or a batch rule that does not hold.
    """
    checked = check(run, rows)
    if checked.rows == 0 and run.files.rows:  # a chunk
        return checked
    found = checked.judged.findings
    try:
        refuse_bad(run.view, checked.rows, checked.reasons, max_bad_share=run.config.max_bad_share)
        if run.config.batch_rules is BatchRules.enforce:
            refuse_unlike(run.view, checked.judged)
        return checked
    except RefusedError as error:
        say_refused(run, error, rows_in=checked.rows, rows_bad=checked.rows_bad, findings=found)
        raise


def say_refused(
    run: Run, error: RefusedError, *, rows_in: int, rows_bad: int = 0, findings: Sequence[Finding] = ()
) -> None:
    """Leave an event of a refusal."""
    event = BatchRefusedEvent(
        view=run.view.name,
        source=run.config.source.path or run.view.source.path,
        source_digest=run.files.digest,
        reason=str(error),
        rows_in=rows_in,
        rows_bad=rows_bad,
        findings=[asdict(finding) for finding in findings],
    )
    run.ledger.append(event, actor=run.actor.name)


def event_of(run: Run, wanted: Wanted, batch: offline.Batch, version: int, new: list[str]) -> BatchIngested:
    """What is said in the ledger of a batch that is in the table."""
    return BatchIngested(
        view=run.view.name,
        view_version=run.view.version,
        ingest_id=batch.ingest_id,
        source=run.files.names,
        source_digest=run.files.digest,
        start=wanted.range.start.isoformat() if wanted.range else None,
        end=wanted.range.end.isoformat() if wanted.range else None,
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


def _count(block: pa.Table) -> tuple[int, dict[str, int]]:
    reasons = pc.value_counts(block[REASON].drop_null()).to_pylist()
    return block.num_rows, {one["values"]: one["counts"] for one in reasons}


if __name__ == "__main__":
    main()
