"""What is asked of a batch as a whole, once its blocks are validated: are rows unique, and is it like the last one.

The questions are pure functions (`validation`, `profile`, `batch_checks` in `store/ingestion`); here are the
steps that ask them of blocks where these lie, and the file that a profile is kept in.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import BatchRefused
from cluster.ledger import Ledger
from cluster.ledger.events import BatchIngested
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import KeyAccess
from feature_jobs.batches.work import Block, Work
from feature_jobs.store.catalog.protection import quarantine_protection
from feature_jobs.store.definitions.views import FeatureView, Field
from feature_jobs.store.ingestion import profile as profiles
from feature_jobs.store.ingestion.batch_checks import Drift, Facts, Finding, Outlier, Unique, findings
from feature_jobs.store.ingestion.profile import Distribution, Profile, Sketch
from feature_jobs.store.ingestion.validation import REASON, SOURCE, reject, repeated, unique_rules


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A batch's profile, and which of the view's batch rules do not hold."""

    profile: Profile
    findings: list[Finding]


def settle(blocks: list[Block], view: FeatureView, work: Work) -> list[Block]:
    """The blocks with rows rejected that are not unique in the batch, as the view's rules say."""
    rules = unique_rules(view)
    for rule in rules:
        parts = [work.run(_select, block, [*rule.of, REASON]) for block in blocks]
        failing = work.run(_repeated, rule, *parts)
        last = rule is rules[-1]
        blocks = [
            work.run(_reject, block, failing, number, rule.reason, last)
            for number, block in enumerate(blocks)
        ]
    return blocks


def judge(
    blocks: list[Block], view: FeatureView, baseline: Profile | None, work: Work, *, now: dt.datetime
) -> Judged:
    """Measure a batch, and ask the view's rules for batches.

    Args:
        blocks: validated and settled.
        view: whose batch it is.
        baseline: of the last good batch, if there is one.
        work: where its steps run.
        now: the moment of ingestion.
    """
    known = {} if baseline is None else baseline.distributions
    first = work.get([work.run(_sketch, block, view.schema, known) for block in blocks])
    sketches = [sketch for sketch, _ in first]
    chosen = profiles.bins(sketches)
    counted = work.get([work.run(_count, block, chosen) for block in blocks])
    measured = profiles.profile(sketches, chosen, counted)
    counts = profiles.added(counts for _, counts in first)
    facts = Facts(batch=measured, baseline=baseline, counts=counts, now=now)
    return Judged(profile=measured, findings=findings(view.checks, facts))


def refuse_bad(view: FeatureView, rows: int, reasons: Mapping[str, int], *, max_bad_share: float) -> None:
    """Refuse a batch with too many bad rows before any of it is written.

    Args:
        view: whose batch it is.
        rows: all of its rows.
        reasons: bad rows by reason.
        max_bad_share: of all rows.

    Raises:
        BatchRefused: with the most frequent reason.
    """
    share = sum(reasons.values()) / max(rows, 1)
    if share <= max_bad_share:
        return
    reason, count = max(reasons.items(), key=lambda item: item[1])
    raise BatchRefused(
        f"View '{view.name}': {share:.1%} of {rows} rows are bad, at most {max_bad_share:.1%} may be; "
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


def unread(view: FeatureView, columns: list[str]) -> str:
    """The tail of a message that says which columns of a source a view leaves; a transform may read them all."""
    source = view.source
    times = (source.event_timestamp, source.created_timestamp)
    read = {*view.join_keys, *(field.name for field in view.schema), *times}
    ignored = [name for name in columns if name not in read and view.transform is None]
    return f"; ignored, because the view does not have them: {', '.join(ignored)}" if ignored else ""


def last_good(ledger: Ledger, view: FeatureView, *, quarantine: str, access: KeyAccess) -> Profile | None:
    """The profile of the last batch that went into a view's table; none before the first one that has one.

    Its values are read only where the view has a rule that compares them, because that takes the quarantine's key.

    Raises:
        AccessDenied, KeyRevoked: as the key store says.
    """
    batches = [
        entry.payload
        for entry in ledger.entries(BatchIngested)
        if entry.payload["view"] == view.name and entry.payload.get("profile")
    ]
    if not batches:
        return None
    summary, ingest_id = batches[-1]["profile"], batches[-1]["ingest_id"]
    if not any(isinstance(check, Drift | Outlier) for check in view.checks):
        return Profile(**summary, newest_event_us=None, distributions={})
    path = profile_path(quarantine, ingest_id)
    table = protected_files(access).read(
        path, protection=quarantine_protection(view.name), place=profile_place(view.name, path)
    )
    return Profile.from_json(table["profile"][0].as_py())


def new_columns(ledger: Ledger, view: str, columns: list[str]) -> list[str]:
    """Columns of a source that it did not have at the view's last batch."""
    known = [
        entry.payload["source_columns"]
        for entry in ledger.entries(BatchIngested)
        if entry.payload["view"] == view and entry.payload.get("source_columns")
    ]
    before = set(known[-1]) if known else set(columns)
    return [name for name in columns if name not in before]


def keep(profile: Profile, view: FeatureView, ingest_id: str, *, quarantine: str, access: KeyAccess) -> None:
    """Write a batch's profile beside the quarantine; written again, it is replaced."""
    path = profile_path(quarantine, ingest_id)
    content = pa.table({"profile": [profile.to_json()]})
    place = profile_place(view.name, path)
    protected_files(access).write(content, path, quarantine_protection(view.name), place=place)


def profile_path(quarantine: str, ingest_id: str) -> str:
    """Where a batch's profile lies."""
    return f"{quarantine}/profiles/{ingest_id}.parquet"


def profile_place(view: str, path: str) -> str:
    """Where a profile says it belongs."""
    return f"{view}/profiles/{path.rsplit('/', 1)[-1]}"


def _select(block: pa.Table, names: list[str]) -> pa.Table:
    return block.select(names)


def _repeated(rule: Unique, *parts: pa.Table) -> list[pa.Array]:
    return repeated(parts, rule)


def _reject(block: pa.Table, failing: list[pa.Array], number: int, reason: str, last: bool) -> pa.Table:
    block = reject(block, failing[number], reason)
    return block.drop_columns([SOURCE]) if last else block


def _sketch(
    block: pa.Table, fields: Sequence[Field], known: Mapping[str, Distribution]
) -> tuple[Sketch, dict[str, list[int]]]:
    good = block.filter(pc.is_null(block[REASON]))
    return profiles.sketch(block, good, fields), profiles.count(good, known)


def _count(block: pa.Table, chosen: Mapping[str, Distribution]) -> dict[str, list[int]]:
    return profiles.count(block.filter(pc.is_null(block[REASON])), chosen)
