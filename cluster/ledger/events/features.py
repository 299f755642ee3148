"""What happens to definitions, feature tables, training sets and the online store."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureViewApplied(LedgerEvent):
    view: str
    version: str
    definition: dict[str, Json]
    module: str = ""
    """The definitions module it was applied from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureViewStateChanged(LedgerEvent):
    view: str
    state: str
    """"active", "deprecated" or "retired"."""
    previous: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureServiceApplied(LedgerEvent):
    service: str
    version: str
    views: dict[str, str]
    """View name to view version, in the order of the service."""
    view_order: list[str]
    module: str = ""
    on_demand: list[dict[str, Json]] = field(default_factory=list)
    """Definitions of its on-demand transforms."""
    missing: dict[str, Json] = field(default_factory=dict)
    """`<view>__<feature>` to what is done where it is missing or expired, without those that become null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchIngested(LedgerEvent):
    view: str
    view_version: str
    ingest_id: str
    source: str
    source_digest: str
    rows_in: int
    rows_stored: int
    rows_quarantined: int
    table_version: int
    reasons: dict[str, int] = field(default_factory=dict)
    """Quarantined rows by reason."""
    quarantine: str | None = None
    profile: dict[str, Json] = field(default_factory=dict)
    """`rows_in`, `rows` and `nulls` by feature; the whole profile lies with the quarantine."""
    findings: list[dict[str, Json]] = field(default_factory=list)
    """Batch rules that did not hold, where the batch was stored all the same."""
    source_columns: list[str] = field(default_factory=list)
    new_columns: list[str] = field(default_factory=list)
    """Those that the batch before did not have."""
    start: str | None = None
    """Of the range of event times that was taken; none is all of the source."""
    end: str | None = None
    rows_late: int = 0
    """Stored, although further behind their stream than it allows for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchMended(LedgerEvent):
    """The rows of a batch, read from the same source again, in place of those that were stored wrongly."""

    view: str
    view_version: str
    source: str
    source_digest: str
    batch: str = ""
    """The batch's `ingest_id`."""
    mend_id: str = ""
    rows_in: int = 0
    rows_kept: int = 0
    """They were as they should be."""
    rows_changed: int = 0
    rows_added: int = 0
    """They were in quarantine."""
    rows_removed: int = 0
    """They are in quarantine now."""
    rows_quarantined: int = 0
    """Of the batch, now."""
    reasons: dict[str, int] = field(default_factory=dict)
    table_version: int | None = None
    """None where the table was right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRefused(LedgerEvent):
    view: str
    source: str
    source_digest: str
    reason: str
    rows_in: int = 0
    rows_bad: int = 0
    findings: list[dict[str, Json]] = field(default_factory=list)
    """Batch rules that did not hold: `rule`, `value`, `threshold`, `said`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineReplayed(LedgerEvent):
    """Rows of a batch's quarantine, read again under the view as it is now."""

    view: str
    view_version: str
    batch: str
    """The batch's `ingest_id`."""
    replay_id: str
    rows_in: int
    rows_stored: int
    rows_quarantined: int
    """Those that stay."""
    reasons: dict[str, int]
    table_version: int | None
    """None where no row was stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewMaterialized(LedgerEvent):
    view: str
    view_version: str
    table_version: int
    as_of: str
    entities: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetBuilt(LedgerEvent):
    service: str
    service_version: str
    rows: int
    row_hash: str
    entities_hash: str
    table_versions: dict[str, int]
    view_versions: dict[str, str]
    output: str
    cutoff: bool = True
    rebuilt_from: int | None = None
    """Seq of the training set that this is the same as."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetNotReproducible(LedgerEvent):
    """Rows that a training set was built from are there no more."""

    training_set: int
    """Seq of its event."""
    service: str
    row_hash: str
    view: str
    table_version: int
    """The version of the view's table that it pins."""
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SkewChecked(LedgerEvent):
    """Served features held against offline ones."""

    model: str
    since: str | None
    rows: int
    """Entities of logged predictions that were compared."""
    rows_left_out: int
    mismatches: int
    features: dict[str, Json]
    """Feature to its counts by verdict and its SMAPE."""
    report: str
    rows_without_score: int = 0
    """Entities that the model gave no finite score for; older events do not have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTableRewritten(LedgerEvent):
    """The same rows in other files: compacted, or under newer keys."""

    view: str
    table_version: int
    files_replaced: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsRemoved(LedgerEvent):
    """Rows of a feature table that no version has any more, on disk neither."""

    view: str
    table_version: int
    """The first without them."""
    cause: str
    older_than: str | None
    """ISO 8601; rows with an event before it, where that was the rule."""
    rows_before: int
    rows_after: int
    files: int
    """Of the version before, that held some."""
