"""What can happen on the platform: one frozen dataclass an event type, JSON values only.

The class name is the event's `type` in the ledger. Fields are part of a permanent record: add with a default,
never rename or remove.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import LedgerCorrupt

Json = Any
"""str, int, float, bool, None, or lists and string-keyed dicts of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEvent:
    """Base of all events."""

    @property
    def type(self) -> str:
        return type(self).__name__

    def payload(self) -> dict[str, Json]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterStarted(LedgerEvent):
    cluster_id: str
    region: str
    num_cpus: int
    num_gpus: int
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterStopped(LedgerEvent):
    cluster_id: str


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
class SweepFinished(LedgerEvent):
    model: str
    family: str
    trials: int
    metric: str
    best: dict[str, Json]
    results: list[dict[str, Json]]
    training_set_hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRegistered(LedgerEvent):
    name: str
    version: int
    family: str
    task: str
    manifest_hash: str
    files: dict[str, str]
    """File name to SHA-256 in hex."""
    lineage: dict[str, Json]
    metrics: dict[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEvaluated(LedgerEvent):
    name: str
    version: int
    data_hash: str
    rows: int
    metrics: dict[str, Json]
    slices: dict[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class AliasMoved(LedgerEvent):
    name: str
    alias: str
    version: int
    previous: int | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDeployed(LedgerEvent):
    name: str
    version: int
    variant: str
    app: str
    route_prefix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactRefused(LedgerEvent):
    name: str
    version: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutStarted(LedgerEvent):
    model: str
    rollout: str
    salt: str
    treatment_version: int
    treatment_variant: str
    champion_version: int
    weight: float
    """Percent of units in the treatment arm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutWeightChanged(LedgerEvent):
    model: str
    rollout: str
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPromoted(LedgerEvent):
    model: str
    rollout: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRolledBack(LedgerEvent):
    model: str
    rollout: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardrailBreached(LedgerEvent):
    model: str
    rollout: str
    metric: str
    treatment: float
    control: float
    threshold: float
    treatment_outcomes: int
    control_outcomes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomesReceived(LedgerEvent):
    model: str
    accepted: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMonitored(LedgerEvent):
    model: str
    variant: str
    version: int
    periods: dict[str, Json]
    drift: dict[str, Json]
    inputs: dict[str, str]
    results: str


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


@dataclass(frozen=True, kw_only=True, slots=True)
class KeysRotated(LedgerEvent):
    view: str
    keys: dict[str, int]
    """Name to newest version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRelabelled(LedgerEvent):
    """A key is about to be described otherwise: class, purposes, region."""

    name: str
    was: dict[str, Json]
    becomes: dict[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRevocation(LedgerEvent):
    """A key is about to be destroyed, with all that is under it."""

    name: str
    described: dict[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEncryptionKeyRotated(LedgerEvent):
    """The keyring is under another key-encryption key."""

    num_keys: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessDecided(LedgerEvent):
    """The event's actor was denied something, or permitted it and is of the sample."""

    allowed: bool
    role: str
    purpose: str
    tenant: str
    entrypoint: str
    """Of the job that asked; empty where no job did."""
    action: str
    kind: str
    resource: str
    column_class: str
    policies: list[str]
    """Those that decided; empty where none permitted it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StrangersRefused(LedgerEvent):
    """Requests without a valid identity within one window, for one reason."""

    reason: str
    count: int
    first_at: float
    """Unix seconds."""
    last_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSigned(LedgerEvent):
    upto_seq: int
    upto_hash: str
    key_id: str
    signature: str
    """Ed25519 over `<upto_seq>:<upto_hash>`, base64."""


_TYPES: dict[str, type[LedgerEvent]] = {cls.__name__: cls for cls in LedgerEvent.__subclasses__()}


def parse(type_name: str, payload: dict[str, Json], *, seq: int) -> LedgerEvent:
    """The typed event of a stored payload.

    Raises:
        LedgerCorrupt: an unknown type, or fields that do not fit it.
    """
    cls = _TYPES.get(type_name)
    if cls is None:
        raise LedgerCorrupt(
            f"Event {seq} has the unknown type '{type_name}'; this release is older than the ledger.", seq=seq
        )
    try:
        return cls(**payload)
    except TypeError as error:
        raise LedgerCorrupt(f"Event {seq} is no valid {type_name}: {error}.", seq=seq) from error
