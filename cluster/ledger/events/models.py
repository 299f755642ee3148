"""Events of models: training, registration, serving, rollouts and monitoring."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


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
class RunStarted(LedgerEvent):
    """A training run started. A run that continues has no second event."""

    model: str
    run: str
    family: str
    settings: dict[str, Json]
    """Everything that determines the model, by dotted name, such as `model.epochs` and `data.hash`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFinished(LedgerEvent):
    """A training run registered its version."""

    model: str
    run: str
    version: int
    metrics: dict[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFailed(LedgerEvent):
    """A training run ended without a model. The same id continues the run."""

    model: str
    run: str
    reason: str
    """Type of the error. A message may contain values of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRegistered(LedgerEvent):
    name: str
    version: int
    family: str
    task: str
    manifest_hash: str
    files: dict[str, str]
    """Maps file name to SHA-256 in hex."""
    lineage: dict[str, Json]
    metrics: dict[str, Json]
    warnings: list[str] = field(default_factory=list)
    """Warnings of the training job, such as an input that reveals the label."""
    origin: dict[str, Json] = field(default_factory=dict)
    """Where an imported version comes from: installation, version, ledger and parity. Empty if trained here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelExported(LedgerEvent):
    """A version was written to a file for another installation. The file may be missing if the export was killed."""

    name: str
    version: int
    bundle: str
    """SHA-256 of the signed statement about the file's parts."""
    key_id: str
    """Id of the key that signed it."""
    parts: dict[str, str]
    """Maps each part to its SHA-256 in hex."""
    column_classes: list[str]
    """Classes of the columns that the version's features come from."""
    ledger_size: int
    """Number of events in the Merkle tree that the file's proofs refer to."""
    ledger_root: str


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
class DeploymentRemoved(LedgerEvent):
    """The Serve application of an unused model version was removed. A new deployment creates it again."""

    name: str
    version: int
    app: str
    reason: str


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
class ShadowStarted(LedgerEvent):
    """A version now gets copies of requests. It replaces the previous shadow version."""

    model: str
    version: int
    app: str
    share: float
    """Percent of requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowStopped(LedgerEvent):
    model: str
    version: int
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
    """The outcomes of one request were accepted. Only older releases wrote this event; `OutcomesSummed` replaces it."""

    model: str
    accepted: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomesSummed(LedgerEvent):
    """One actor's outcomes for one model that one replica accepted within about a minute."""

    model: str
    requests: int
    accepted: int
    """Number of outcomes."""
    digest: str
    """SHA-256 of the concatenated digests (in hex) of the requests."""
    first_at: float
    """Unix seconds."""
    last_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionsCompacted(LedgerEvent):
    """Segments of a model's prediction log were moved into its table."""

    model: str
    table_version: int
    segments: int
    records: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomesCompacted(LedgerEvent):
    """Segments of a model's outcome log were moved into its table."""

    model: str
    table_version: int
    segments: int
    records: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMonitored(LedgerEvent):
    model: str
    variant: str
    version: int
    periods: dict[str, Json]
    drift: dict[str, Json]
    inputs: dict[str, str]
    results: str
    missing: dict[str, Json] = field(default_factory=dict)
    """Maps input to the chunks whose share of nulls is outside the thresholds. Older events have neither this field nor
    the next three fields."""
    unseen: dict[str, Json] = field(default_factory=dict)
    """Maps input to the chunks with unusually many values that the model does not know."""
    undefined: dict[str, Json] = field(default_factory=dict)
    """Maps figure and then chunk to the reason why the figure has no value or no threshold for the chunk."""
    left_out: dict[str, Json] = field(default_factory=dict)
    """Maps reason to the number of records that no figure includes."""
