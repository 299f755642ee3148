"""Events of feature definitions, feature tables, training sets and the online store."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureViewApplied(LedgerEvent):
    view: str
    version: str
    definition: dict[str, Json]
    module: str = ""
    """Python module that contains the definition."""


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
    """Maps view name to view version, in the order of the service."""
    view_order: list[str]
    module: str = ""
    on_demand: list[dict[str, Json]] = field(default_factory=list)
    """Definitions of the service's on-demand transforms."""
    missing: dict[str, Json] = field(default_factory=dict)
    """Maps `<view>__<feature>` to the rule for its missing and expired values. Without a rule, they become null."""


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
    """Maps reason to the number of rows that were quarantined for it."""
    quarantine: str | None = None
    profile: dict[str, Json] = field(default_factory=dict)
    """`rows_in`, `rows` and `nulls` by feature. The full profile is stored with the quarantine."""
    findings: list[dict[str, Json]] = field(default_factory=list)
    """Batch rules that failed, although the batch was stored."""
    source_columns: list[str] = field(default_factory=list)
    new_columns: list[str] = field(default_factory=list)
    """Source columns that the previous batch did not have."""
    start: str | None = None
    """Start of the ingested range of event times; null means no limit."""
    end: str | None = None
    """End of the ingested range of event times; null means no limit."""
    rows_late: int = 0
    """Stored rows that were later than the stream's allowed lateness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchMended(LedgerEvent):
    """A batch was read from its source again, and wrongly stored rows were replaced."""

    view: str
    view_version: str
    source: str
    source_digest: str
    batch: str = ""
    """The batch's `ingest_id`."""
    mend_id: str = ""
    rows_in: int = 0
    rows_kept: int = 0
    """Rows that were stored correctly."""
    rows_changed: int = 0
    rows_added: int = 0
    """Rows that moved from quarantine to the table."""
    rows_removed: int = 0
    """Rows that moved from the table to quarantine."""
    rows_quarantined: int = 0
    """Rows of the batch that are in quarantine now."""
    reasons: dict[str, int] = field(default_factory=dict)
    table_version: int | None = None
    """New version of the table; null if no row had to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRefused(LedgerEvent):
    view: str
    source: str
    source_digest: str
    reason: str
    rows_in: int = 0
    rows_bad: int = 0
    findings: list[dict[str, Json]] = field(default_factory=list)
    """Failed batch rules: `rule`, `value`, `threshold`, `said`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineReplayed(LedgerEvent):
    """The quarantined rows of a batch were read again with the current definition of the view."""

    view: str
    view_version: str
    batch: str
    """The batch's `ingest_id`."""
    replay_id: str
    rows_in: int
    rows_stored: int
    rows_quarantined: int
    """Rows that stay in quarantine."""
    reasons: dict[str, int]
    table_version: int | None
    """New version of the table; null if no row was stored."""


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
    """`seq` of the event of the training set that was built again; null for a new training set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetNotReproducible(LedgerEvent):
    """A training set cannot be rebuilt any more, because some of its rows were removed."""

    training_set: int
    """`seq` of the training set's event."""
    service: str
    row_hash: str
    view: str
    table_version: int
    """Version of the view's table that the training set was built from."""
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SkewChecked(LedgerEvent):
    """Served features were compared with offline values."""

    model: str
    since: str | None
    rows: int
    """Number of entities of logged predictions that were compared."""
    rows_left_out: int
    mismatches: int
    features: dict[str, Json]
    """Maps feature to its number of values by result of the comparison (such as `mismatch`), and its SMAPE."""
    report: str
    rows_without_score: int = 0
    """Entities without a finite score from the model. Older events do not have this field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTableRewritten(LedgerEvent):
    """The table's rows were written to new files: to compact them, to encrypt them with newer keys, or to change the
    number of buckets."""

    view: str
    table_version: int
    files_replaced: int
    num_buckets: int | None = None
    """The new number of buckets; None if it stayed the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsRemoved(LedgerEvent):
    """Rows of a feature table were removed from all versions and from disk."""

    view: str
    table_version: int
    """First version without the rows."""
    cause: str
    older_than: str | None
    """ISO 8601 time; rows with an earlier event time were removed. Null if they were removed by another rule."""
    rows_before: int
    rows_after: int
    files: int
    """Number of files of the previous version that contained removed rows."""
