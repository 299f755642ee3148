"""Apply the rules for whole batches to validated blocks: uniqueness, and comparison with the last good batch.

The rules are pure functions: `validation` and `profiling` in `store/ingestion`, and `batch_checks` in
`store/definitions`. The steps here run them on each block, in this process or in Ray tasks.
"""

from __future__ import annotations

import datetime as dt
import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import BatchRejected
from cluster.ledger import Ledger
from cluster.ledger.events import BatchIngested
from feature_jobs.batches.reading import CheckedSource
from feature_jobs.batches.work import Block, Work
from feature_jobs.store.definitions.batch_checks import (
    Drift,
    Facts,
    Finding,
    Outlier,
    Unique,
    collect_findings,
)
from feature_jobs.store.definitions.views import FeatureView, Field
from feature_jobs.store.ingestion import profiling
from feature_jobs.store.ingestion.profiling import Sketch
from feature_jobs.store.ingestion.quarantine_files import QuarantineFiles
from feature_jobs.store.ingestion.validation import REASON, SOURCE, find_repeated_rows, reject, unique_rules
from feature_jobs.store.types.batch_profile import Distribution, Profile


class BatchRules(enum.Enum):
    """What happens to a batch that fails one of the view's batch rules."""

    enforce = "enforce"
    """The batch is refused."""
    report = "report"
    """The batch is stored, its event contains the findings, and the next batch is compared with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchResult:
    """A batch's profile, and the batch rules that it fails."""

    profile: Profile
    findings: list[Finding]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedBatch:
    """A batch after transform and checks."""

    blocks: list[Block]
    """Validated tables, in the order of the source."""
    sizes: list[int]
    """Number of rows of each block."""
    reasons: dict[str, int]
    """Number of bad rows by reason."""
    result: BatchResult
    columns: list[str]
    """Columns of the source."""

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def rows_bad(self) -> int:
        return sum(self.reasons.values())


def check_batch(rows: CheckedSource, view: FeatureView, baseline: Profile | None, work: Work) -> CheckedBatch:
    """Count the rows of a batch, and apply the rules for whole batches.

    Args:
        rows: the rows of the batch.
        view: the batch's view.
        baseline: profile of the last good batch, if there is one.
        work: runs the steps.
    """
    blocks = reject_repeated_rows(rows.blocks, view, work)
    counts: list[BlockCounts] = work.get([work.run(count_rows, block, num_cpus=0.1) for block in blocks])
    reasons: Counter[str] = Counter()
    for block in counts:
        reasons.update(block.reasons)
    return CheckedBatch(
        blocks=blocks,
        sizes=[block.rows for block in counts],
        reasons=dict(reasons),
        result=apply_batch_rules(blocks, view, baseline, work, now=dt.datetime.now(dt.UTC)),
        columns=rows.columns,
    )


def reject_repeated_rows(blocks: list[Block], view: FeatureView, work: Work) -> list[Block]:
    """Mark the rows that break one of the view's `Unique` rules as bad, and return the new blocks."""
    rules = unique_rules(view)
    for rule in rules:
        parts = [work.run(_select, block, [*rule.of, REASON]) for block in blocks]
        failing = work.run(_repeated, rule, *parts)
        is_last = rule is rules[-1]
        blocks = [
            work.run(_reject, block, failing, number, rule.reason, is_last)
            for number, block in enumerate(blocks)
        ]
    return blocks


def apply_batch_rules(
    blocks: list[Block], view: FeatureView, baseline: Profile | None, work: Work, *, now: dt.datetime
) -> BatchResult:
    """Profile a batch, and apply the view's batch rules.

    Args:
        blocks: validated blocks, after `reject_repeated_rows`.
        view: the batch's view.
        baseline: profile of the last good batch, if there is one.
        work: runs the steps.
        now: the time of ingestion.
    """
    previous = {} if baseline is None else baseline.distributions
    passes: list[FirstPass] = work.get(
        [work.run(first_pass, block, view.schema, previous) for block in blocks]
    )
    chosen = profiling.choose_bins([block.sketch for block in passes])
    counted = work.get([work.run(_count, block, chosen) for block in blocks])
    measured = profiling.profile([block.sketch for block in passes], chosen, counted)
    return BatchResult(profile=measured, findings=find_failures(passes, measured, view, baseline, now=now))


def find_failures(
    passes: Sequence[FirstPass],
    measured: Profile,
    view: FeatureView,
    baseline: Profile | None,
    *,
    now: dt.datetime,
) -> list[Finding]:
    """Return the view's batch rules that a batch fails. The profile's distributions are not needed.

    Args:
        passes: results of the first pass over each block.
        measured: the batch's profile.
        view: the batch's view.
        baseline: profile of the last good batch, if there is one.
        now: the time of ingestion.
    """
    counts = profiling.add_counts(block.counts for block in passes)
    return collect_findings(view.checks, Facts(batch=measured, baseline=baseline, counts=counts, now=now))


def require_few_bad_rows(
    view: FeatureView, rows: int, reasons: Mapping[str, int], *, max_bad_share: float
) -> None:
    """Refuse a batch with too many bad rows, before any of it is written.

    Args:
        view: the batch's view.
        rows: number of all rows.
        reasons: number of bad rows by reason.
        max_bad_share: maximum share of bad rows.

    Raises:
        BatchRejected: the share of bad rows is larger; the message states the most frequent reason.
    """
    share = sum(reasons.values()) / max(rows, 1)
    if share <= max_bad_share:
        return
    reason, count = max(reasons.items(), key=lambda item: item[1])
    raise BatchRejected(
        f"View '{view.name}': {share:.1%} of {rows} rows are bad, at most {max_bad_share:.1%} may be; "
        f"mostly: {reason} ({count}). Nothing was stored. Correct the source, or raise max_bad_share."
    )


def require_no_findings(view: FeatureView, result: BatchResult) -> None:
    """Refuse a batch that fails a batch rule.

    Raises:
        BatchRejected: the batch fails at least one rule; the message lists all failed rules.
    """
    if result.findings:
        messages = "; ".join(finding.said for finding in result.findings)
        raise BatchRejected(
            f"View '{view.name}': {messages}. Nothing was stored. Correct the source, or store the batch anyway with "
            "batch_rules=report."
        )


def describe_ignored(view: FeatureView, columns: list[str]) -> str:
    """List the source columns that a view does not read, as the end of a message.

    The text is empty if the view reads all columns, or has a transform, because a transform may read any column.
    """
    source = view.source
    of_source = (source.event_timestamp, source.created_timestamp, source.deleted)
    read = {*view.join_keys, *(field.name for field in view.schema), *of_source}
    ignored = [name for name in columns if name not in read and view.transform is None]
    return f"; ignored, because the view does not have them: {', '.join(ignored)}" if ignored else ""


def load_baseline(ledger: Ledger, view: FeatureView, quarantine: QuarantineFiles) -> Profile | None:
    """Return the newest profile among a view's stored batches, or None if there is no profile.

    Its distributions are read only if one of the view's rules compares values, because they are encrypted with the
    quarantine's key.

    Raises:
        AccessDenied, KeyRevoked: the key store refuses the quarantine's key.
    """
    last = ledger.newest(BatchIngested, view=view.name, having="profile")
    if last is None:
        return None
    summary, ingest_id = last.payload["profile"], last.payload["ingest_id"]
    if not any(isinstance(check, Drift | Outlier) for check in view.checks):
        return Profile(**summary, newest_event_us=None, distributions={})
    return quarantine.read_profile(ingest_id)


def new_columns(ledger: Ledger, view: str, columns: list[str]) -> list[str]:
    """Return the source columns that the view's last batch did not have."""
    last = ledger.newest(BatchIngested, view=view, having="source_columns")
    before = set(last.payload["source_columns"] if last else columns)
    return [name for name in columns if name not in before]


class BlockCounts(NamedTuple):
    """The rows of one block."""

    rows: int
    reasons: dict[str, int]
    """Number of bad rows by reason."""


def count_rows(block: pa.Table) -> BlockCounts:
    """Count the rows of a validated block."""
    reasons = pc.value_counts(block[REASON].drop_null()).to_pylist()
    return BlockCounts(block.num_rows, {reason["values"]: reason["counts"] for reason in reasons})


class FirstPass(NamedTuple):
    """The result of the first pass over one block."""

    sketch: Sketch
    counts: dict[str, list[int]]
    """By feature: how many values of the block are in each bin of the last good batch."""


def _select(block: pa.Table, names: list[str]) -> pa.Table:
    return block.select(names)


def _repeated(rule: Unique, *parts: pa.Table) -> list[pa.Array]:
    return find_repeated_rows(parts, rule)


def _reject(block: pa.Table, failing: list[pa.Array], number: int, reason: str, is_last: bool) -> pa.Table:
    block = reject(block, failing[number], reason)
    return block.drop_columns([SOURCE]) if is_last else block


def first_pass(block: pa.Table, fields: Sequence[Field], previous: Mapping[str, Distribution]) -> FirstPass:
    """Run the first pass over a validated block. `previous` has the distributions of the last good batch."""
    good = block.filter(pc.is_null(block[REASON]))
    return FirstPass(profiling.sketch(block, good, fields), profiling.count(good, previous))


def merge_passes(passes: Sequence[FirstPass]) -> FirstPass:
    """Merge the results of the first pass over some blocks."""
    if len(passes) == 1:
        return passes[0]
    return FirstPass(
        profiling.merge([each.sketch for each in passes]),
        profiling.add_counts(each.counts for each in passes),
    )


def _count(block: pa.Table, chosen: Mapping[str, Distribution]) -> dict[str, list[int]]:
    return profiling.count(block.filter(pc.is_null(block[REASON])), chosen)
