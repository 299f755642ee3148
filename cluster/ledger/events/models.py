"""Events of models: training, registration, serving, rollouts and monitoring."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from cluster.ledger.events.base import Json, LedgerEvent


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
    contents: dict[str, str] = field(default_factory=dict)
    """Maps file name to the SHA-256 in hex of its content before encryption. So equal weights have equal hashes. Older
    events do not have this field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRetired(LedgerEvent):
    """A version must not be deployed any more."""

    name: str
    version: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReinstated(LedgerEvent):
    """A retired version may be deployed again."""

    name: str
    version: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReproduced(LedgerEvent):
    """A version was trained again from its lineage, and both results were compared."""

    name: str
    version: int
    copy_name: str
    copy_version: int
    """The version that was trained for the comparison. It is retired."""
    training_set: str
    """`found`, or `rebuilt` from the manifest."""
    same_files: dict[str, bool]
    """Maps file name to whether the content is the same, byte for byte."""
    largest_difference: float | None
    """Largest difference of a weight; None if the weights cannot be compared number by number."""
    metrics: dict[str, Json]
    """Maps metric to its value in the original and in the copy. Only metrics that differ."""
    libraries: dict[str, Json]
    """Maps library to its version in the original and in the copy. Only libraries that differ."""


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
    chosen_rows: str = ""
    """`held_out` or `all`. Older events have neither this field nor the next fields."""
    intervals: dict[str, Json] = field(default_factory=dict)
    """Confidence intervals: level, replicates, entities, and `metrics` by name."""
    fairness: dict[str, Json] = field(default_factory=dict)
    """By column: rates of each group, and the differences between the groups."""
    threshold: dict[str, Json] = field(default_factory=dict)
    """The threshold with the lowest stated cost on the validation rows, and its cost on the evaluated rows."""
    robustness: dict[str, Json] = field(default_factory=dict)
    """The main metric with missing and shifted inputs."""
    attributions: dict[str, Json] = field(default_factory=dict)
    """How much each input contributes to the scores, and by which method this was computed."""
    parity: dict[str, Json] = field(default_factory=dict)
    """How far the scores of the ONNX graph differ from those of the network."""
    requirements: dict[str, Json] = field(default_factory=dict)
    """By metric: the required bound, the value, and whether it is met."""


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
    unit: str = "header"
    """What names the unit of a request: `header` (`X-Unit-ID`) or `subject` (the token's `sub`)."""

    def payload(self) -> dict[str, Json]:
        """Return the fields. The default unit is left out: an older release refuses an event with an unknown field."""
        content = dataclasses.asdict(self)
        if self.unit == "header":
            del content["unit"]
        return content


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
    reconstruction: list[str] = field(default_factory=list)
    """Chunks in which all inputs together have drifted. Older events lack this field and the next two."""
    traffic: dict[str, Json] = field(default_factory=dict)
    """Maps `requests`, `refused` and `unseen` to the hours in which the model's traffic was unusual."""
    fits: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the file with what was fitted to the reference, by its name. A file without one here is never read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringStarted(LedgerEvent):
    """A run of batch scoring began. The fields are all that decides which rows it writes, so a resumed run reads them.

    A run without `ScoringFinished` is not finished: it was stopped, or refused its rows.
    """

    run: str
    model: str
    version: int
    inputs_from: str
    """Where the inputs come from: `join`, `latest` or `given`."""
    as_of: str
    """The time that features are read at, and at which the rows count as scored."""
    service: str
    service_version: str
    table_versions: dict[str, int]
    """Maps feature view to Delta table version."""
    input: str
    input_hash: str
    """SHA-256 of the hashes of all input files."""
    input_version: int | None
    """Version of the input, if it is a Delta table."""
    rows: int
    output: str
    keep: list[str]
    """Columns of the input that are copied to the output."""
    settings: dict[str, Json]
    """Other settings that decide the rows or their order in files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringFinished(LedgerEvent):
    """All rows of a run are in its output."""

    run: str
    model: str
    version: int
    input_hash: str
    rows: int
    scored: int
    set_aside: dict[str, int]
    """Number of rows without a score, by reason."""
    output: str
    manifest_hash: str
    """SHA-256 of the output's manifest, which has the hash of each file."""
    columns: list[str]
    """Columns of the output."""
    left_out: list[str]
    """Inputs that the output lacks, because the caller may not export them."""
